"""What tests of results share: datasets of coloured squares, models asked about them, and a task that keeps a log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pyarrow as pa

from mmflow.core.config import OPERATIONAL
from mmflow.dataset.opened import Dataset
from mmflow.inference.compute import Request, compute
from mmflow.inference.result import Columns, Gives, Result, Stored, column
from mmflow.inference.runner import Done, Model, Pool
from tests.dataset.handmade import Handmade, write_dataset
from tests.evaluation.models import COLOURS, captions_of


def square(key: str, **changes: Any) -> Handmade:
    """A sample with an English caption."""
    fields = {"captions": [{"language": "en", "text": f"a {key} square"}], "size": (24, 20)} | changes
    return Handmade(key=key, **fields)


def squares(*shards: int, first: int = 0, **changes: Any) -> list[tuple[str, list[Handmade]]]:
    """Shards of split train with so many samples each, numbered through."""
    starts = [first + sum(shards[:number]) for number in range(len(shards))]
    return [
        ("train", [square(f"{COLOURS[row % 6]}-{row}", **changes) for row in range(start, start + size)])
        for start, size in zip(starts, shards, strict=True)
    ]


def varied(directory: Path) -> Dataset:
    """Five samples in two shards: captions in two languages, in one, and none; with and without questions."""
    first, second = (captions_of(colour) for colour in COLOURS[:2])
    english = [{"language": "en", "text": text} for text in first]
    questions = [{"question": text, "answers": ["red"]} for text in ("what colour is it?", "is it round?")]
    samples = [
        square("several", captions=english, metadata={"questions": questions}),
        square("chinese-first", captions=[{"language": "zh", "text": "the one"}, english[1]]),
        square("silent", captions=[], metadata={"questions": questions[1:]}),
        square("chinese", captions=[{"language": "zh", "text": second[2]}]),
        square("long", captions=[{"language": "en", "text": " ".join(second * 3)}], metadata={"questions": "none"}),
    ]
    return write_dataset(directory, [("train", samples[:3]), ("train", samples[3:])])


def ask(
    store: Path | str, package: str, datasets: Dataset | Sequence[Dataset], *results: Result, **changes: Any
) -> Done:
    """Compute what is missing of split train of the datasets, two rows at a time."""
    datasets = [datasets] if isinstance(datasets, Dataset) else datasets
    requests = [
        Request(model=Model(package=package), dataset=dataset.uri, split="train", results=results)
        for dataset in datasets
    ]
    settings: dict[str, Any] = {"batch_size": 2, "pool": Pool(), "max_errors": 1.0} | changes
    return compute(requests, str(store), progress=lambda done, total, note: None, **settings)


def answers(store: Path | str, package: str, dataset: Dataset, result: Result) -> list[dict[str, Any]]:
    """The rows of a stored result, of all shards of split train."""
    stored = Stored(str(store), Model(package=package).digest, result)
    shards = [shard for shard in dataset.shards("train") if shard.samples]
    return [row for shard in shards for row in stored.read(shard).to_pylist()]


def files(store: Path) -> dict[str, bytes]:
    """What is in a store, by path."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


class Logged(Result):
    """How many captions a row has. A line in the log for each batch says which process was asked for which rows."""

    task: ClassVar[str] = "logged"
    needs: ClassVar[tuple[Gives, ...]] = (Gives(),)
    remedy: ClassVar[str] = ""
    looks: bool = True
    log: Annotated[str, OPERATIONAL]
    """A file."""
    waits_at: Annotated[str | None, OPERATIONAL] = None
    """The key before which it waits for <log>.go."""

    @property
    def changes(self) -> tuple[str, ...]:
        return ("",) if self.looks else ()

    def fields(self, loaded: Any) -> list[pa.Field]:
        return [column("captions", pa.int32(), "how many captions")]

    def run(self, batch: Any, started: Any) -> Columns:
        keys = [sample.key for sample in batch.samples]
        with open(self.log, "a") as log:
            log.write(json.dumps({"process": os.getpid(), "keys": keys}) + "\n")
        while self.waits_at in keys and not os.path.exists(f"{self.log}.go"):
            time.sleep(0.02)
        return {"captions": pa.array([len(sample.captions) for sample in batch.samples])}


def logged(log: Path) -> list[dict[str, Any]]:
    """The lines of a log, those that are whole."""
    text = log.read_text() if log.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def keys_of(log: Path) -> list[str]:
    """The rows that were asked for, in order."""
    return [key for line in logged(log) for key in line["keys"]]
