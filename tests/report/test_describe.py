"""The page of a dataset says what is in it, is the same each time, and lets no text of the data act in a browser."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.artifacts import MANIFEST
from mmflow.core.errors import MissingArtifactError
from mmflow.dataset.adopt import adopt
from mmflow.dataset.opened import Dataset
from mmflow.dataset.verify import verify_dataset
from mmflow.report.dataset_page import (
    MAX_VALUE,
    describe,
    histogram_of,
    render,
    shares,
    write_description,
)
from mmflow.report.page import thumbnail
from tests.dataset.handmade import Handmade, handmade, picture, write_dataset
from tests.report.test_report import HOSTILE, Page, poisoned

REJECTED = [
    {"source": f"records.jsonl:{number}", "key": f"bad-{number}", "reason": reason, "detail": f"detail {number}"}
    for number, reason in enumerate(["image_missing"] * 5 + ["caption_missing"])
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """100 samples in two splits and six rejected records."""
    samples = [handmade(number) for number in range(100)]
    shards = [("train", samples[:40]), ("train", samples[40:80]), ("train", []), ("dev", samples[80:])]
    return write_dataset(tmp_path_factory.mktemp("describe") / "dataset", shards, REJECTED)


def test_figures_are_those_of_the_samples(dataset: Dataset) -> None:
    found, pictures = describe(dataset)
    samples = [handmade(number) for number in range(100)]
    assert found["totals"]["samples"] == 100
    assert {name: (split["samples"], split["shards"]) for name, split in found["splits"].items()} == {
        "train": (80, 3),
        "dev": (20, 1),
    }
    assert found["captions"] == sum(len(sample.captions) for sample in samples)
    assert found["languages"] == [{"name": "en", "count": 100}, {"name": "zh", "count": 50}]
    assert found["licenses"] == [{"name": "CC0-1.0", "count": 66}, {"name": "none named", "count": 34}]
    assert (found["clips"], found["frames"]) == (14, 42)
    aspects = {row["name"]: row["count"] for row in found["aspects"]}
    assert (aspects["1:2 to 4:5"], aspects["5:4 to 2:1"]) == (33, 67)
    assert sum(found["histograms"]["side"]["counts"]) == 100
    assert found["histograms"]["side"]["median"] == 48
    assert found["histograms"]["characters"]["largest"] == len("picture 99")
    assert found["reasons"] == [
        {"name": "image_missing", "count": 5, "examples": REJECTED[:3]},
        {"name": "caption_missing", "count": 1, "examples": REJECTED[5:]},
    ]
    assert [len(examples) for examples in found["examples"].values()] == [24, 20]
    assert set(pictures) == {example["key"] for examples in found["examples"].values() for example in examples}


def test_repeated_pictures_and_captions_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = picture(1, (64, 48))
    monkeypatch.setattr("tests.dataset.handmade.picture", lambda seed, size: body)
    captions = [{"language": "en", "text": text} for text in ("one", "two", "one", "ONE")]
    samples = [Handmade(key=f"key-{number}", captions=[caption]) for number, caption in enumerate(captions)]
    found, _ = describe(write_dataset(tmp_path / "dataset", [("train", samples[:2]), ("train", samples[2:])]))
    assert found["repeated"] == {"pictures": 3, "captions": 2}


def test_page_is_the_same_each_time_and_leaves_the_dataset_as_it_is(dataset: Dataset, tmp_path: Path) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset.uri, copy)
    manifest = (copy / MANIFEST).read_bytes()
    pages = [Path(write_description(str(copy))).read_bytes() for _ in range(2)]
    assert pages[0] == pages[1]
    assert (copy / "describe.html").read_bytes() == pages[0]
    assert (copy / MANIFEST).read_bytes() == manifest
    assert verify_dataset(str(copy)) == []


def test_page_is_one_file_whose_links_lead_somewhere(dataset: Dataset) -> None:
    html = render(*describe(dataset))
    parsed = Page(html)
    assert parsed.open == []
    targets = {attrs["href"] for tag, attrs in parsed.elements if tag == "a"}
    assert targets == {f"#{attrs['id']}" for tag, attrs in parsed.elements if tag == "section"}
    assert not re.search(r"https?://|@import", html)
    sources = [attrs["src"] for tag, attrs in parsed.elements if tag == "img"]
    assert len(sources) == 44
    assert all(str(source).startswith("data:image/jpeg;base64,") for source in sources)
    assert "Of 106 records 6 were kept out (5.7%), each with its reason." in parsed.text
    source = dataset.manifest["sources"][0]["name"]
    for text in ("image missing", "CC0-1.0", "records.jsonl:0", dataset.fingerprint, source, '"seed": 7'):
        assert text in parsed.text


def test_hostile_text_stays_text(dataset: Dataset) -> None:
    found, _ = describe(dataset)
    found = poisoned(found)
    for names in ("splits", "examples"):
        found[names][HOSTILE] = found[names].pop("train")
    found["sources"] = [{HOSTILE: HOSTILE}]
    parsed = Page(render(found, {HOSTILE: b"no picture"}))
    assert [tag for tag, _ in parsed.elements].count("script") == 1
    assert not [attrs for _, attrs in parsed.elements if any(name.startswith("on") for name in attrs)]
    assert all((attrs.get("src") or "data:").startswith("data:") for _, attrs in parsed.elements)
    assert "<script>alert(1)</script>" in parsed.text


def test_adopted_dataset_and_one_without_rejected_records_have_a_page(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "made", [("train", [handmade(number) for number in range(5)])])
    adopt(str(tmp_path / "adopted"), [made.tar_uri(made.shards("train")[0])])
    for uri in (tmp_path / "made", tmp_path / "adopted"):
        parsed = Page(Path(write_description(str(uri))).read_text())
        assert "rejected" not in parsed.ids()
        assert "Every one of 5 records is in." in parsed.text
    assert "pictures that repeat" not in parsed.text  # nobody hashed the pixels of adopted images
    with pytest.raises(MissingArtifactError, match="nothing was committed"):
        write_description(str(tmp_path))


def test_a_damaged_sample_does_not_cost_the_page(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "made", [("train", [handmade(1), handmade(2)])])
    tar = Path(made.tar_uri(made.shards("train")[0]))
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert "damaged" in Page(Path(write_description(made.uri)).read_text()).text


@given(st.lists(st.integers(0, MAX_VALUE), min_size=1, max_size=300))
def test_histograms_count_everything_once(values: list[int]) -> None:
    counts = np.bincount(values, minlength=MAX_VALUE + 1)
    found = histogram_of(counts)
    assert found is not None
    assert sum(found["counts"]) + found["beyond"] == len(values)
    assert found["beyond"] <= 0.005 * len(values)
    assert len(found["edges"]) == len(found["counts"]) + 1 <= 40
    assert found["counts"] == np.histogram([v for v in values if v < found["edges"][-1]], found["edges"])[0].tolist()
    assert found["largest"] == max(values)
    assert sorted(values)[(len(values) - 1) // 2] == found["median"]


def test_a_histogram_of_nothing_is_none_and_long_tables_are_cut() -> None:
    assert histogram_of(np.zeros(MAX_VALUE + 1, np.int64)) is None
    rows = shares({f"language {number:02d}": 1 for number in range(50)})
    assert len(rows) == 41
    assert rows[-1] == {"name": "10 others", "count": 10}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_thumbnails_are_small_and_none_where_nothing_can_be_decoded(format: str) -> None:
    small = thumbnail(picture(1, (1000, 400), format), 160)
    assert small is not None
    assert small.startswith(b"\xff\xd8\xff")
    assert len(small) < 20_000
    assert thumbnail(b"no picture", 160) is None
    assert thumbnail(picture(1, (1000, 400), format)[:200], 160) is None
