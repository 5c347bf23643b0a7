"""Resume: the time from opening the dataset to the first batch, late in an epoch compared with early in it."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from tests.benchmarks import data
from tests.benchmarks.measure import SHARE, call, rounds
from tests.benchmarks.table import Row

SAMPLES_PER_SHARD = 100
BATCH = 64
IMAGE_PIXELS = 224
MAX_TOKENS = 32
VOCABULARY = 2_000
STARTS = 12  # first batches a figure, from as many seeds: their pictures are of other sizes
PEERS = ()
VERSIONS = ("torch", "tokenizers", "simplejpeg", "numpy")


def run() -> list[Row]:
    """The loader as training starts it, by threads, at 1% and at 99% of an epoch of JPEGs in fifty shards."""
    dataset = jpeg_shards()
    found = rounds(
        {name: lambda share=share: call("tests.benchmarks.resume:first_batch", uri=str(dataset), share=share)
         for name, share in (("early", 0.01), ("late", 0.99))}
    )  # fmt: skip
    ratio = statistics.median(late / early for late, early in zip(found["late"], found["early"], strict=True))
    milliseconds = {name: 1000 * statistics.median(seconds) for name, seconds in found.items()}
    return [
        Row(name=f"first batch of {BATCH}, at 99% of an epoch against 1%", ours=ratio, unit="× the time",
            goal="< 1.1", met=ratio < 1.1, note=f"{milliseconds['late']:.0f} ms against {milliseconds['early']:.0f} "
            "ms, dataset opened and decoded anew")
    ]  # fmt: skip


def jpeg_shards() -> Path:
    """The JPEGs of 1 to 2 megapixels in many shards."""
    return data.dataset("resume", round(SHARE * data.NUM_JPEGS), f"shard.samples_per_shard={SAMPLES_PER_SHARD}")


# --- called in a process of its own -----------------------------------------------------------------------------------


def first_batch(uri: str, share: float) -> float:
    """Mean seconds from a state at `share` of the epoch to its batch; late imports are not counted."""
    from contextlib import closing

    from mmflow.dataset.opened import open_dataset
    from mmflow.loading.config import LoaderConfig
    from mmflow.loading.opening import open_loader
    from mmflow.loading.plan import LoaderState

    tokenizer = data.tokenizer_of(uri, VOCABULARY)
    seconds = []
    for seed in range(STARTS + 1):
        began = time.perf_counter()
        loader = open_loader(
            LoaderConfig(), open_dataset(uri), tokenizer, global_batch_size=BATCH, image_pixels=IMAGE_PIXELS,
            max_tokens=MAX_TOKENS, seed=seed,
        )  # fmt: skip
        # The last batch is left out: half of it is padding, which repeats a few samples.
        step = int(share * (loader.order.steps_per_epoch - 1))
        loader.state = LoaderState(0, step * BATCH)
        with closing(iter(loader)) as batches:
            batch = next(batches)
            seconds.append(time.perf_counter() - began)
        assert batch.state == LoaderState(0, (step + 1) * BATCH)
    return statistics.mean(seconds[1:])
