"""A small corpus with one record of every defect, and the dataset built from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from mmflow.cleaning.config import CaptionConfig, ImageConfig
from mmflow.cleaning.prepare import remove_pieces
from mmflow.core.artifacts import commit
from mmflow.dataset.config import ShardConfig
from mmflow.dataset.grow import parts_of, write_parts
from mmflow.dataset.opened import Dataset, open_dataset
from mmflow.sources.config import SourceConfig
from mmflow.sources.sources import list_units
from tests.dataset.handmade import small_dataset
from tests.imaging.picture_files import bomb, file_of

__all__ = ["small_dataset"]

NUM_GOOD = 120
SETTINGS = ShardConfig(
    image=ImageConfig(side=48, max_pixels=1_000_000),
    captions=CaptionConfig(max_characters=1000),
    samples_per_shard=16,
    seed=7,
)


@dataclass(frozen=True)
class Corpus:
    """The records, the rejection reason of each bad one, and the captions of the good ones."""

    uri: str
    reason_of_line: dict[int, str]
    captions_of_key: dict[str, list[dict[str, str]]]


def write_corpus(directory: Path) -> Corpus:
    """120 good records in three splits and one record of every defect; the same bytes at every call."""
    random = np.random.default_rng(0)
    (directory / "images").mkdir(parents=True)
    good: list[dict[str, Any]] = []
    for number in range(NUM_GOOD):
        extension, format = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))[number % 3]
        pixels = np.kron(random.integers(0, 256, (6, 8, 3), np.uint8), np.ones((12, 12, 1), np.uint8))
        Image.fromarray(pixels).save(directory / f"images/{number}.{extension}", format)
        captions = [{"language": "en", "text": f"drawing {number}"}, {"language": "zh", "text": f"狐狸 {number}"}]
        good.append(
            {
                "key": f"key-{number}",
                "image": f"images/{number}.{extension}",
                "captions": captions[: 1 + number % 2],
                "split": ("train", "train", "train", "dev", "test")[number % 5],
                "number": number,
            }
        )
    lines: list[tuple[bytes, str | None]] = [(json.dumps(record).encode(), None) for record in good]
    bad = _bad_records(directory, good[0])
    for position, entry in enumerate(bad):
        lines.insert((position + 1) * len(lines) // (len(bad) + 1), entry)
    uri = directory / "records.jsonl"
    uri.write_bytes(b"\n".join(line for line, _ in lines) + b"\n")
    return Corpus(
        str(uri),
        {number: reason for number, (_, reason) in enumerate(lines, 1) if reason is not None},
        {record["key"]: record["captions"] for record in good},
    )


def _bad_records(directory: Path, template: dict[str, Any]) -> list[tuple[bytes, str | None]]:
    images: dict[str, tuple[bytes | None, str]] = {
        "missing.png": (None, "image_missing"),
        "cut.png": (file_of(Image.effect_noise((64, 64), 50))[:2000], "image_truncated"),
        "empty.png": (b"", "image_truncated"),
        "page.png": (b"<html>not found</html>", "image_not_an_image"),
        "tiny.png": (file_of(Image.new("RGB", (3, 3))), "image_too_small"),
        "narrow.png": (file_of(Image.new("RGB", (400, 20))), "image_too_narrow"),
        "bomb.png": (bomb(30_000, 30_000), "image_too_large"),
        "large.png": (bomb(1_001, 1_000), "image_too_large"),
        "folder.png": (None, "image_unreadable"),
        "loop.png": (None, "image_unreadable"),
        "nul\0.png": (None, "image_unreadable"),
    }
    for name, (data, _) in images.items():
        if data is not None:
            (directory / "images" / name).write_bytes(data)
    (directory / "images" / "folder.png").mkdir()
    (directory / "images" / "loop.png").symlink_to("loop.png")
    changes: list[tuple[dict[str, Any], str]] = [
        *(
            ({"key": f"bad-image-{number}", "image": f"images/{name}"}, reason)
            for number, (name, (_, reason)) in enumerate(images.items())
        ),
        ({"key": "never-fetched", "image": "http://example.com/a.png"}, "fetch_pending"),
        ({"key": "bad-scheme", "image": "gopher://example.com/a.png"}, "image_unsupported"),
        ({"key": "no-captions", "captions": []}, "caption_missing"),
        ({"key": "blank-caption", "captions": [{"language": "en", "text": " \u200b\n"}]}, "caption_missing"),
        ({"key": "short-caption", "captions": [{"language": "en", "text": "x"}]}, "caption_too_short"),
        ({"key": "long-caption", "captions": [{"language": "en", "text": "x" * 1_000_000}]}, "caption_too_long"),
        ({"key": "a.b.c"}, "key_invalid"),
        ({"key": "../x"}, "key_invalid"),
        ({"key": "UPPER"}, "key_invalid"),
        ({"captions": 5}, "record_malformed"),
    ]
    records = [(json.dumps({**template, **change}).encode(), reason) for change, reason in changes]
    raw = [(b"{not json", "record_malformed"), (b'{"key": "\xff"}', "record_malformed")]
    # These come after the good records that they repeat: once in the same split, once in another.
    repeated = [
        (json.dumps({**template, "captions": [{"text": "twice"}]}).encode(), "key_repeated"),
        (json.dumps({**template, "captions": [{"text": "elsewhere"}], "split": "dev"}).encode(), "key_repeated"),
    ]
    return [*records, *raw, *repeated]


def contents(directory: Path | str) -> dict[str, bytes]:
    """Relative path → bytes of every file under a directory."""
    root = Path(directory)
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "dirty")


def build_and_commit(directory: Path | str, *uris: str, settings: ShardConfig = SETTINGS, **more: Any) -> Dataset:
    """The dataset of JSONL files or folders, as the shard stage builds it. Ray must run."""
    from mmflow.dataset.build import build_dataset

    uri = str(directory)
    sources = [SourceConfig(uri=source_uri, keys="strict") for source_uri in uris]
    fields = build_dataset(
        uri,
        sources=sources,
        units=more.pop("units", list_units(sources)),
        settings=settings,
        progress=more.pop("progress", lambda done, total, note: None),
        **more,
    )
    write_parts(uri, parts_of(list_units(sources), sources))
    commit(uri, "dataset", fields)
    remove_pieces(uri)
    return open_dataset(uri)


Build = Callable[..., Dataset]


@pytest.fixture(scope="session")
def build(ray_cluster: None) -> Build:
    """Builds and commits the dataset of sources, with `SETTINGS` by default."""
    return build_and_commit


@pytest.fixture(scope="session")
def dataset(build: Build, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Read only: a test that damages it works on a copy."""
    return build(tmp_path_factory.mktemp("dataset"), corpus.uri)


@pytest.fixture
def copy(dataset: Dataset, tmp_path: Path) -> Dataset:
    """A copy of the `dataset` of the test file."""
    shutil.copytree(dataset.uri, tmp_path / "copy")
    return open_dataset(str(tmp_path / "copy"))


@pytest.fixture
def remote(dataset: Dataset) -> Iterator[Dataset]:
    """The `dataset` of the test file in an object store in memory."""
    store = fsspec.filesystem("memory")
    store.put(dataset.uri, "/bucket/dataset", recursive=True)
    yield open_dataset("fsspec+memory:///bucket/dataset")
    store.rm("/bucket", recursive=True)
