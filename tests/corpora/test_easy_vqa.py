"""The easy-VQA corpus: every question stays with its picture, and no caption is invented."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from mmflow.core.errors import MisuseError
from tests.corpora.made import written

# The package's functions, which read the files beside it.
PACKAGE = """
import json
from pathlib import Path

DATA = Path(__file__).parent / "data"

def _questions(split):
    return tuple(list(column) for column in zip(*json.loads((DATA / split / "questions.json").read_text())))

def _paths(split):
    return {int(path.stem): str(path) for path in (DATA / split / "images").iterdir()}

def get_train_questions(): return _questions("train")
def get_test_questions(): return _questions("test")
def get_train_image_paths(): return _paths("train")
def get_test_image_paths(): return _paths("test")
"""
QUESTIONS = {
    "train": [("what shape is there?", "circle", 10), ("is it red?", "no", 2), ("what color is it?", "teal", 10)],
    "test": [("is there a triangle?", "yes", 2)],
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package with two training pictures and one test picture, imported instead of the real one."""
    tree = tmp_path / "site" / "easy_vqa"
    for split, questions in QUESTIONS.items():
        (tree / "data" / split / "images").mkdir(parents=True)
        (tree / "data" / split / "questions.json").write_text(json.dumps(questions))
        for number in {number for _, _, number in questions}:
            colour = (number, 0, 200 if split == "test" else 100)
            Image.new("RGB", (64, 64), colour).save(tree / "data" / split / "images" / f"{number}.png")
    (tree / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tree.parent))
    monkeypatch.delitem(sys.modules, "easy_vqa", raising=False)
    importlib.invalidate_caches()
    yield tree
    sys.modules.pop("easy_vqa", None)


def test_each_picture_gets_its_questions_and_no_caption(tmp_path: Path, package: Path) -> None:
    records = written(tmp_path / "corpus", "easy_vqa")
    assert [(record["key"], record["split"]) for record in records] == [
        ("train-00002", "train"),
        ("train-00010", "train"),
        ("test-00002", "test"),
    ]
    assert [record["questions"] for record in records] == [
        [{"question": "is it red?", "answers": ["no"]}],
        [
            {"question": "what shape is there?", "answers": ["circle"]},
            {"question": "what color is it?", "answers": ["teal"]},
        ],
        [{"question": "is there a triangle?", "answers": ["yes"]}],
    ]
    for record in records:
        assert record.keys() == {"key", "image", "split", "questions", "license"}
        number = int(record["key"][-5:])
        original = package / "data" / record["split"] / "images" / f"{number}.png"
        assert (tmp_path / "corpus" / record["image"]).read_bytes() == original.read_bytes()


def test_without_the_package_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(MisuseError, match=r"pip install 'mmflow\[easy-vqa\]'"):
        written(tmp_path / "corpus", "easy_vqa")
    assert not (tmp_path / "corpus" / "records.jsonl").exists()
