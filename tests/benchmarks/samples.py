"""Samples: JPEG shards to float tensors of random crops, with tokens; compared with webdataset and with a bare loop."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmflow.loading.config import AugmentConfig, CropConfig
from tests.benchmarks import data
from tests.benchmarks.measure import SHARE, call, rounds
from tests.benchmarks.table import Row, faster
from tests.benchmarks.tars import count_of

NUM_SAMPLES = 600  # of each size
SETS = {"1–2 megapixels": "{resize: none}", "0.3–0.8 megapixels": "{resize: longest, side: 900, quality: 90}"}
SIDE, MAX_TOKENS, BATCH = 224, 32, 50
AUGMENT = AugmentConfig(crop=CropConfig(area=(0.5, 1.0)))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SEED = 7
PASSES = 3
PEERS = ()
VERSIONS = ("webdataset", "pillow", "simplejpeg", "torch", "tokenizers", "numpy")


def run() -> list[Row]:
    """Both sets by every contestant in turn: the same shards, the same crops, one tokenizer."""
    rows = []
    for number, (name, image) in enumerate(SETS.items()):
        count = max(BATCH, round(SHARE * NUM_SAMPLES))
        dataset = data.dataset(f"samples-{number}", count, f"shard.image={image}")
        tokenizer = str(dataset.with_suffix(".tokenizer.json"))
        data.tokenizer_of(str(dataset), 4000).save(tokenizer)
        arguments = {"uri": str(dataset), "tokenizer": tokenizer}
        found = rounds({each: partial(_rate, each, arguments) for each in ("ours", "webdataset_pillow", "bare_loop")})
        rows += [
            faster(f"{name}: read, crop, tokenise", found["ours"], "webdataset, Pillow", found["webdataset_pillow"],
                   unit="samples/CPU-s", goal=3, note="the same crop, by Pillow's antialiased resize"),
            faster(f"{name}: read, crop, tokenise", found["ours"], "bare loop", found["bare_loop"],
                   unit="samples/CPU-s", goal=0.9, note="the same decode, resize and tokenise, from memory"),
        ]  # fmt: skip
    return rows


def _rate(name: str, arguments: dict[str, str]) -> float:
    return float(call(f"tests.benchmarks.samples:{name}", **arguments))


# --- contestants, each called in a process of its own: samples per CPU-second, on one core ----------------------------


def _per_cpu_second(batches: Callable[[], Iterator[tuple[Any, Any]]], count: int) -> float:
    """Of the median pass after the first, which has late imports. The time of all threads is counted.

    Bound to a core before any thread begins: on two of a shared machine a thread's seconds tell as much of its
    neighbour as of its work.
    """
    passes = []
    for _ in range(1 + PASSES):
        began, seen = time.process_time(), 0
        for pixels, token_ids in batches():
            assert pixels.shape[1:] == (3, SIDE, SIDE)
            assert len(token_ids) == len(pixels)
            seen += len(pixels)
        assert seen == count
        passes.append(time.process_time() - began)
    return count / statistics.median(passes[1:])


def _bind() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def ours(uri: str, tokenizer: str) -> float:
    """The loader as training uses it, one thread, every body checked against its hash."""
    import torch

    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.loading.batches import ViewSettings, normalise
    from mmflow.loading.loader import Loader
    from mmflow.loading.plan import Order
    from mmflow.loading.tokens import load_tokenizer

    _bind()
    torch.set_num_threads(1)
    opened = open_dataset(uri)
    (split,) = opened.splits
    reader = Reader(opened, split)
    order = Order(tuple(shard.samples for shard in reader.shards), BATCH, SEED)
    settings = ViewSettings(seed=SEED, image_pixels=SIDE, max_tokens=MAX_TOKENS, augment=AUGMENT)
    loader = Loader(order, [reader], load_tokenizer(tokenizer), settings, count=1)

    ready = iter(loader)  # one for both passes: as much is prepared ahead at the end of the second as at its start

    def batches() -> Iterator[tuple[Any, Any]]:
        for _ in range(order.steps_per_epoch):
            batch = next(ready)
            pixels = normalise(batch.pixels, MEAN, STD)
            # The last batch may be padded: padding is made too, but not counted.
            yield (pixels, batch.token_ids) if batch.real.all() else (pixels[batch.real], batch.token_ids[batch.real])

    rate = _per_cpu_second(batches, len(reader))
    ready.close()
    return rate


def webdataset_pillow(uri: str, tokenizer: str) -> float:
    """webdataset's own pipeline: its Pillow decoder, the same crops, Pillow's resize, the same tokenizer."""
    import torch
    import webdataset
    from PIL import Image
    from tokenizers import Tokenizer

    from mmflow.loading.transforms import DRAWS, draw_view, generator

    _bind()
    torch.set_num_threads(1)
    words = Tokenizer.from_file(tokenizer)
    tars = [str(path) for path in sorted((Path(uri) / "shards").glob("*.tar"))]
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (MEAN, STD))

    def crop(sample: tuple[str, Any, str]) -> tuple[Any, list[int]]:
        key, image, text = sample
        left, top, across, down = _crop(
            image.width, image.height, generator(SEED, 0, key).random(DRAWS).tolist(), draw_view
        )
        view = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
        pixels = torch.from_numpy(np.array(view)).permute(2, 0, 1).float().div(255)
        return (pixels - mean) / std, words.encode(text).ids[:MAX_TOKENS]

    def collate(samples: Sequence[tuple[Any, list[int]]]) -> tuple[Any, Any]:
        longest = max(len(ids) for _, ids in samples)
        tokens = torch.tensor([ids + [0] * (longest - len(ids)) for _, ids in samples])
        return torch.stack([pixels for pixels, _ in samples]), tokens

    def batches() -> Iterator[tuple[Any, Any]]:
        pipeline = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).decode("pil")
        yield from pipeline.to_tuple("__key__", "jpg", "txt").map(crop).batched(BATCH, collation_fn=collate)

    return _per_cpu_second(batches, count_of(uri))


def bare_loop(uri: str, tokenizer: str) -> float:
    """Nothing but libjpeg's scaled decoding, the resize, the tokenizer and the tensors; the files are in memory."""
    import simplejpeg
    import torch

    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.imaging.resample import resample
    from mmflow.loading.batches import normalise
    from mmflow.loading.tokens import load_tokenizer
    from mmflow.loading.transforms import DRAWS, draw_view, generator

    _bind()
    torch.set_num_threads(1)
    words = load_tokenizer(tokenizer)
    opened = open_dataset(uri)
    samples = []
    for split in opened.splits:
        for each in Reader(opened, split):
            height, width, _, _ = simplejpeg.decode_jpeg_header(each.image)
            draws = generator(SEED, 0, each.key).random(DRAWS).tolist()
            part = tuple(value / length for value, length in zip(_crop(width, height, draws, draw_view),
                                                                 (width, height) * 2, strict=True))  # fmt: skip
            samples.append((each.image, part, each.captions[0].text))

    def batches() -> Iterator[tuple[Any, Any]]:
        for first in range(0, len(samples), BATCH):
            views = []
            for body, (left, top, across, down), _ in samples[first : first + BATCH]:
                least = (SIDE / down, SIDE / across)
                pixels = simplejpeg.decode_jpeg(body, min_height=least[0], min_width=least[1])
                height, width, _ = pixels.shape
                box = (int(left * width), int(top * height), int((left + across) * width), int((top + down) * height))
                views.append(resample(pixels, SIDE, box))
            encodings = words.encode_batch_fast([text for _, _, text in samples[first : first + BATCH]])
            longest = max(len(encoding.ids) for encoding in encodings)
            tokens = torch.tensor([encoding.ids + [0] * (longest - len(encoding.ids)) for encoding in encodings])
            yield normalise(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2), MEAN, STD), tokens

    return _per_cpu_second(batches, len(samples))


def _crop(width: int, height: int, draws: Any, draw_view: Any) -> tuple[float, float, float, float]:
    """Left, top, width and height in pixels."""
    left, top, across, down = draw_view(width, height, AUGMENT, draws).part
    return left * width, top * height, across * width, down * height
