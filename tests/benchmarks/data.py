"""The sets that are measured on, made once into workspace/bench: openclipart as it is, and larger JPEGs of it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from tests.benchmarks.measure import CORES, ROOT, SCRATCH, mmflow

RECIPE = ROOT / "pipelines" / "recipes" / "openclipart.yaml"
NUM_JPEGS = 5_000
MIN_PIXELS, MAX_PIXELS = 1_000_000, 2_000_000
LARGEST_SOURCE = 20_000_000  # pixels: a larger one takes seconds to turn into a JPEG that is no better


def openclipart() -> Path:
    """The corpus's records.jsonl; made by the first call, which downloads 156 MB."""
    mmflow("corpus", str(RECIPE), f"workspace={SCRATCH / 'openclipart'}")
    found = sorted((SCRATCH / "openclipart" / "corpus").glob("*/records.jsonl"), key=os.path.getmtime)
    return found[-1]


def jpegs() -> Path:
    """The records.jsonl of 5,000 JPEGs of 1 to 2 megapixels, drawn from openclipart's files in the order of a hash."""
    directory = SCRATCH / "jpegs"
    if not (directory / "records.jsonl").exists():
        source = openclipart()
        fit = [record for record in read(source) if _is_fit(source.parent / record["image"])]
        fit.sort(key=lambda record: hashlib.sha256(record["key"].encode()).digest())
        if len(fit) < NUM_JPEGS:
            raise RuntimeError(f"{source}: only {len(fit)} images are fit to make JPEGs of")
        (directory / "images").mkdir(parents=True, exist_ok=True)
        print(f"drawing {NUM_JPEGS:,} JPEGs into {directory} (minutes, once)", flush=True)
        with ProcessPoolExecutor(CORES) as pool:
            made = list(pool.map(partial(_draw, source.parent, directory), fit[:NUM_JPEGS], chunksize=16))
        write(directory / "records.jsonl", made)
    return directory / "records.jsonl"


def share_of(records: Path, count: int) -> Path:
    """The records.jsonl of `count` records, spread evenly over a set; a smaller set is repeated under other keys."""
    everything = list(read(records))
    if count == len(everything):
        return records
    name = hashlib.sha256(str(records).encode()).hexdigest()[:8]
    directory = SCRATCH / "shares" / f"{name}-{count}"
    directory.mkdir(parents=True, exist_ok=True)
    for folder in ("png", "images"):
        if (records.parent / folder).exists() and not (directory / folder).is_symlink():
            (directory / folder).symlink_to(records.parent / folder)
    step = len(everything) / count
    chosen = [everything[int(number * step)] for number in range(count)]
    if step < 1:
        chosen = [{**record, "key": f"{record['key']}-{number}"} for number, record in enumerate(chosen)]
    write(directory / "records.jsonl", chosen)
    return directory / "records.jsonl"


def dataset(name: str, count: int, *overrides: str) -> Path:
    """A dataset of about `count` of the JPEGs, all of them in one split, made once by `mmflow shard`."""
    from tests.benchmarks.build import KEEP_ALL, shard

    made = SCRATCH / f"{name}-{count}"
    if not made.exists():
        shutil.move(shard(share_of(jpegs(), count), [*KEEP_ALL, "shard.splits={}", *overrides])[1], made)
    return made


def tokenizer_of(uri: str, vocabulary_size: int) -> Any:
    """A tokenizer of a dataset's own captions."""
    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.loading.tokens import train_tokenizer

    opened = open_dataset(uri)
    samples = (sample for split in opened.splits for sample in Reader(opened, split))
    return train_tokenizer((caption.text for sample in samples for caption in sample.captions), vocabulary_size)


def read(records: Path) -> Iterator[dict[str, Any]]:
    """The lines of a records.jsonl."""
    with records.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write(path: Path, records: list[dict[str, Any]]) -> None:
    """Write a records.jsonl, atomically."""
    staged = path.with_suffix(".staged")
    staged.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    staged.replace(path)


def _is_fit(path: Path) -> bool:
    """Whether a JPEG can be drawn of it: no link to another, not tiny, not huge, not a strip."""
    if path.is_symlink():
        return False
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        shortest, longest = sorted(image.size)
    return shortest >= 16 and shortest * longest <= LARGEST_SOURCE and longest <= 4 * shortest


def _draw(source: Path, directory: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record of a JPEG that shows a drawing on white, its pixels a number between the bounds, by its key's hash."""
    name = f"images/{record['key'].lower()}.jpg"
    if not (directory / name).exists():  # by a run that was stopped
        drawing = Image.open(source / record["image"]).convert("RGBA")
        fraction = int.from_bytes(hashlib.sha256(record["key"].encode()).digest()[8:12]) / 2**32
        scale = math.sqrt((MIN_PIXELS + fraction * (MAX_PIXELS - MIN_PIXELS)) / (drawing.width * drawing.height))
        size = (math.ceil(drawing.width * scale), math.ceil(drawing.height * scale))
        page = Image.new("RGBA", size, "white")
        page.alpha_composite(drawing.resize(size, Image.Resampling.BICUBIC))
        staged = directory / f"{name}.staged"
        page.convert("RGB").save(staged, "JPEG", quality=90)
        staged.rename(directory / name)
    caption = f"{record['key']}: " + (record["captions"][0]["text"] if record["captions"] else "a drawing")
    return {"key": record["key"], "image": name, "captions": [{"language": "en", "text": caption}]}
