"""Loader workers: threads beside processes beside torch's DataLoader, on large pictures and on small ones.

What `loader.workers.kind` is by default rests on this.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import data, resume
from tests.benchmarks.build import shard
from tests.benchmarks.measure import CORES, SCRATCH, SHARE, call, rounds
from tests.benchmarks.table import Row, faster

SMALL_SIDE = 96  # stored pixels: the quickstart's
BATCH = 128
WARM_BATCHES = 6  # more than are prepared ahead
SECONDS = 6.0
PEERS = ()
VERSIONS = ("torch", "tokenizers", "simplejpeg", "numpy")
KINDS = ("threads", "processes", "torch_dataloader")


def run() -> list[Row]:
    """Samples a second with as many workers as cores, a step that costs nothing, and the time to the first batch."""
    sets = {
        "1–2 megapixels → 224": {"uri": str(resume.jpeg_shards()), "image_pixels": 224},
        f"{SMALL_SIDE} pixels → 64": {"uri": str(_small_shards()), "image_pixels": 64},
    }
    rows = []
    for name, arguments in sets.items():
        found = rounds({f"{name}: {kind}": partial(_figure, kind, "samples_per_second", arguments) for kind in KINDS})
        threads, processes, torch_s = (found[f"{name}: {kind}"] for kind in KINDS)
        rows += [
            faster(f"{CORES} threads, {name}", threads, "our processes", processes),
            faster(f"{CORES} threads, {name}", threads, "torch DataLoader's processes", torch_s),
        ]
    small = sets[f"{SMALL_SIDE} pixels → 64"]
    began = rounds({kind: partial(_figure, kind, "first_batch_seconds", small) for kind in KINDS})
    inverse = {kind: [1 / seconds for seconds in values] for kind, values in began.items()}
    rows += [
        faster(f"first batch of {BATCH}, threads", inverse["threads"], peer, inverse[kind], unit="1/s")
        for kind, peer in (("processes", "our processes"), ("torch_dataloader", "torch DataLoader's processes"))
    ]
    return rows


def _figure(kind: str, figure: str, arguments: dict[str, Any]) -> float:
    return float(call("tests.benchmarks.workers:measure", kind=kind, **arguments)[figure])


def _small_shards() -> Path:
    count = round(SHARE * data.NUM_JPEGS)
    dataset = SCRATCH / f"small-{count}"
    if not dataset.exists():
        records = data.share_of(data.jpegs(), count)
        keep_all = ["shard.captions={}", "shard.duplicates={exact: false}", "shard.splits={}"]
        image = f"shard.image={{side: {SMALL_SIDE}, quality: 92}}"
        _, built = shard(records, [*keep_all, image, f"shard.samples_per_shard={resume.SAMPLES_PER_SHARD}"])
        shutil.move(built, dataset)
    return dataset


# --- called in a process of its own -----------------------------------------------------------------------------------


def measure(kind: str, uri: str, image_pixels: int) -> dict[str, float]:
    """Seconds from the loader's start to its first batch, and samples a second once the warm-up is over."""
    import torch

    torch.set_num_threads(1)
    tokenizer = resume.tokenizer_of(uri)
    began = time.perf_counter()
    with _batches(kind, uri, image_pixels, tokenizer) as batches:
        next(batches)
        first = time.perf_counter() - began
        for _ in range(WARM_BATCHES):
            next(batches)
        began, samples = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            samples += len(next(batches).keys)
        seconds = time.perf_counter() - began
    return {"first_batch_seconds": first, "samples_per_second": samples / seconds}


@contextmanager
def _batches(kind: str, uri: str, image_pixels: int, tokenizer: Any) -> Iterator[Generator[Any, None, None]]:
    from contextlib import closing

    loader = _loader("threads" if kind == "torch_dataloader" else kind, uri, image_pixels, tokenizer)
    source = _dataloader(loader, uri, image_pixels, tokenizer) if kind == "torch_dataloader" else iter(loader)
    with closing(source) as batches:
        yield batches


def _loader(kind: str, uri: str, image_pixels: int, tokenizer: Any) -> Any:
    from mmflow.dataset.opened import open_dataset
    from mmflow.loading.config import AugmentConfig, LoaderConfig, WorkersConfig
    from mmflow.loading.opening import open_loader

    augment = AugmentConfig(max_zoom=1.2, max_aspect=1.1, max_shift=0.05, flip=0.5, brightness=0.1, contrast=0.1)
    config = LoaderConfig(augment=augment, workers=WorkersConfig.model_validate({"kind": kind, "count": CORES}))
    return open_loader(
        config, open_dataset(uri), tokenizer, global_batch_size=BATCH, image_pixels=image_pixels,
        max_tokens=resume.MAX_TOKENS, seed=1,
    )  # fmt: skip


def _dataloader(loader: Any, uri: str, image_pixels: int, tokenizer: Any) -> Generator[Any, None, None]:
    """The same batches by torch's own workers: a map-style dataset whose index is a state."""
    from torch.utils.data import DataLoader

    def states() -> Iterator[Any]:
        state = loader.state
        while True:
            yield state
            state = loader.order.after(state)

    yield from DataLoader(
        Batches(uri, image_pixels, tokenizer),  # type: ignore[arg-type]
        batch_size=None, sampler=states(), num_workers=CORES, multiprocessing_context="forkserver",
    )  # fmt: skip


class Batches:
    """Each worker opens a loader of its own when it is first asked."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.loader: Any = None

    def __getitem__(self, state: Any) -> Any:
        if self.loader is None:
            self.loader = _loader("threads", *self.arguments)
        return self.loader.batch(state)
