"""Loader workers: threads, processes and torch's DataLoader, on large pictures and on small ones.

The default of `loader.workers.kind` rests on this.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import data, resume
from tests.benchmarks.measure import CORES, SHARE, call, rounds
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
    image = f"shard.image={{side: {SMALL_SIDE}, quality: 92}}"
    split = f"shard.samples_per_shard={resume.SAMPLES_PER_SHARD}"
    return data.dataset("small", round(SHARE * data.NUM_JPEGS), image, split)


# --- called in a process of its own -----------------------------------------------------------------------------------


def measure(kind: str, uri: str, image_pixels: int) -> dict[str, float]:
    """Seconds from the loader's start to its first batch, and samples a second once the warm-up is over."""
    import torch

    torch.set_num_threads(1)
    tokenizer = data.tokenizer_of(uri, resume.VOCABULARY)
    began = time.perf_counter()
    loader = _loader("threads" if kind == "torch_dataloader" else kind, uri, image_pixels, tokenizer)
    with closing(_dataloader(loader) if kind == "torch_dataloader" else iter(loader)) as batches:
        next(batches)
        first = time.perf_counter() - began
        for _ in range(WARM_BATCHES):
            next(batches)
        began, samples = time.perf_counter(), 0
        while time.perf_counter() - began < SECONDS:
            samples += len(next(batches).keys)
        seconds = time.perf_counter() - began
    return {"first_batch_seconds": first, "samples_per_second": samples / seconds}


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


def _dataloader(loader: Any) -> Generator[Any, None, None]:
    """The same batches by torch's own workers: a map-style dataset whose index is a state."""
    from torch.utils.data import DataLoader

    def states() -> Iterator[Any]:
        state = loader.state
        while True:
            yield state
            state = loader.order.after(state)

    yield from DataLoader(
        Batches(loader),  # type: ignore[arg-type]
        batch_size=None, sampler=states(), num_workers=CORES, multiprocessing_context="forkserver",
    )  # fmt: skip


class Batches:
    """The batch of a state, as the loader's workers make it."""

    def __init__(self, loader: Any) -> None:
        self.parts = (loader.readers, loader.tokenizer, loader.settings)
        self.order = loader.order

    def __getitem__(self, state: Any) -> Any:
        import numpy as np

        from mmflow.loading.batches import assemble, load_slots

        slots, settings = self.order.batch(state), self.parts[2]
        pixels = np.empty((len(slots), 1, settings.image_pixels, settings.image_pixels, 3), np.uint8)
        return assemble(load_slots(*self.parts, slots, pixels), pixels, self.order.after(state), settings, 0)
