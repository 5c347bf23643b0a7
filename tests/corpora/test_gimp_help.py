"""The GIMP help corpus: each picture with its caption and section, without the navigation of the pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.gimp_help import CAPTION, SECTION
from mmflow.recipe import load_recipe
from mmflow.training.check import check_training
from tests.corpora.made import deb, write_files, written

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "gimp_help.yaml"
OPTIONS = " ".join(f"option{number}" for number in range(160))
HEADER = '<div class="navheader"><a href="x.html"><img src="images/next.png" alt="Next" /></a></div>'
FIGURE = """<div class="figure"><p class="title"><strong>Figure 1.1. The <span>“Blur”</span> filter</strong></p>
 <div class="mediaobject"><img src="images/filters/before.png" alt="The “Blur”
  filter" /><div class="caption"><p>Original image</p></div></div>
 <div class="mediaobject"><img src="images/filters/after.png" alt="The “Blur” filter" /></div></div>"""
PAGES = {
    "blur.html": f"""<html><body>{HEADER}<div class="sect2"><h3>1. Blur</h3><div class="sect3">{FIGURE}</div>
 <div class="sect3"><h4>Options</h4><p>{OPTIONS}</p><span><img src="images/menus/dialog.png" /></span></div></div>
 </body></html>""",
    "about.html": f'<html><body>{HEADER}<div><img src="images/using/logo.png" alt="The logo" /></div></body></html>',
}
IMAGES = ("next.png", "filters/before.png", "filters/after.png", "menus/dialog.png", "using/logo.png")


def files() -> dict[str, bytes]:
    pictures = {f"images/{name}": f"pixels of {name}".encode() for name in IMAGES}
    return {name: text.encode() for name, text in PAGES.items()} | pictures


def write_package(directory: Path) -> Path:
    installed = {f"./usr/share/gimp/2.0/help/en/{name}": body for name, body in files().items()}
    package = deb({"./usr/share/doc/gimp-help-en/copyright": b"GFDL"} | installed)
    return write_files(directory, {"gimp-help-en_2.10.34-2_all.deb": package})


def write(directory: Path, packages: Path) -> dict[str, dict[str, Any]]:
    """The records by image; the progress counts pages."""
    records = written(directory, "gimp_help", num_steps=2, package_directory=packages)
    assert len(records) == 4
    return {record["image"]: record for record in records}


def texts_of(record: dict[str, Any]) -> dict[str, str]:
    return {caption["language"]: caption["text"] for caption in record["captions"]}


def test_a_picture_gets_its_caption_and_its_section(tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", write_package(tmp_path / "package"))
    assert list(records) == [f"images/{name}" for name in ("using/logo.png", *IMAGES[1:4])]
    assert all((tmp_path / "corpus" / image).read_bytes() == files()[image] for image in records)
    before, after, dialog = (texts_of(records[f"images/{name}"]) for name in IMAGES[1:4])
    assert before[CAPTION] == "The “Blur” filter: Original image"
    assert after[CAPTION] == "The “Blur” filter"
    assert before[SECTION] == after[SECTION]
    assert before[SECTION].startswith("1. Blur Figure 1.1. The “Blur” filter Original image Options option0 ")
    assert dialog == {SECTION: f"Options {OPTIONS}"}
    assert texts_of(records["images/using/logo.png"]) == {CAPTION: "The logo"}
    assert records["images/filters/after.png"]["key"] == "blur-3"
    assert {record["page"] for record in records.values()} == {"blur", "about"}


def test_an_installed_package_is_read_in_place(tmp_path: Path) -> None:
    write_files(tmp_path / "help" / "en", files())
    left = tmp_path / "corpus" / "images"  # of a killed run
    write_files(left, {"gone.png": b""})
    records = write(tmp_path / "corpus", tmp_path / "help")
    assert not (left / "gone.png").exists()
    assert write(tmp_path / "again", write_package(tmp_path / "package")) == records
    assert len(list((tmp_path / "help").rglob("*.*"))) == len(files())


def test_a_folder_without_the_package_names_the_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=r"gimp-help-en_\*\.deb.*package_directory"):
        write(tmp_path / "corpus", tmp_path)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_the_recipe_passes_the_training_check_and_groups_by_page() -> None:
    recipe = load_recipe(str(RECIPE))
    check_training("pretrain", recipe.pretrain)
    assert recipe.shard.group_by == "page"
    assert recipe.evaluate.languages == [SECTION, CAPTION]
    assert recipe.pretrain.model.max_tokens > recipe.evaluate.long_text.truncated_tokens
