"""Batches of one rank, from any position of any epoch: the position is the loader's whole state."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.loading.config import AugmentConfig
from mmflow.loading.plan import EpochPlan, batch_positions, num_steps, rank_slots
from mmflow.loading.reader import Caption, Reader
from mmflow.loading.tokens import pad, tokenise
from mmflow.loading.transforms import decode, drop_tokens, random_view


@dataclass(frozen=True)
class LoaderState:
    """Where the next global batch begins."""

    epoch: int = 0
    position: int = 0  # samples of the epoch already dealt, over all ranks


@dataclass(frozen=True)
class Batch:
    """One rank's slice of a global batch: B rows of this rank, T tokens in the longest caption."""

    keys: tuple[str, ...]
    pixels: Tensor  # (B, 3, side, side) uint8, channels last in memory
    token_ids: Tensor  # (B, T) int64
    token_mask: Tensor  # (B, T) int64, 1 where real
    real: Tensor  # (B,) bool: False for the padding of the last batch
    state: LoaderState  # where the batch after this one begins


@dataclass(frozen=True)
class BatchSettings:
    """What makes a batch, beside the dataset and the position."""

    global_batch_size: int
    image_pixels: int
    max_tokens: int
    window: int
    seed: int
    augment: AugmentConfig
    language_weights: dict[str, float]


def batches(
    reader: Reader, tokenizer: Tokenizer, settings: BatchSettings, state: LoaderState, *, rank: int, world_size: int
) -> Iterator[Batch]:
    """Endless batches of one rank from `state` on, epoch after epoch."""
    shard_samples = tuple(shard.samples for shard in reader.shards)
    slots = rank_slots(settings.global_batch_size, rank, world_size)
    steps = num_steps(len(reader), settings.global_batch_size)
    plan = EpochPlan(shard_samples, settings.seed, state.epoch, settings.window)
    while True:
        if plan.epoch != state.epoch:
            plan = EpochPlan(shard_samples, settings.seed, state.epoch, settings.window)
        step = state.position // settings.global_batch_size
        positions, real = batch_positions(len(reader), settings.global_batch_size, step, slots)
        step += 1
        state = (
            LoaderState(state.epoch, step * settings.global_batch_size)
            if step < steps
            else LoaderState(state.epoch + 1)
        )
        yield _load(reader, tokenizer, settings, plan, positions, real, state)


def _load(
    reader: Reader,
    tokenizer: Tokenizer,
    settings: BatchSettings,
    plan: EpochPlan,
    positions: NDArray[np.int64],
    real: NDArray[np.bool_],
    state: LoaderState,
) -> Batch:
    shards, rows = plan.locate(positions)
    views, captions, keys, generators = [], [], [], []
    for shard, row in zip(shards.tolist(), rows.tolist(), strict=True):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence((settings.seed, plan.epoch, shard, row))))
        sample = reader.read(shard, row)
        pixels = decode(sample.image, sample.extension, settings.image_pixels)
        views.append(random_view(pixels, settings.image_pixels, settings.augment, random))
        captions.append(choose_caption(sample.captions, settings.language_weights, random))
        keys.append(sample.key)
        generators.append(random)
    tokens = tokenise(tokenizer, captions, settings.max_tokens)
    if settings.augment.token_dropout:
        tokens = [
            drop_tokens(row, settings.augment.token_dropout, random)
            for row, random in zip(tokens, generators, strict=True)
        ]
    token_ids, token_mask = pad(tokens)
    return Batch(
        keys=tuple(keys),
        pixels=pixels_tensor(views),
        token_ids=torch.from_numpy(token_ids),
        token_mask=torch.from_numpy(token_mask),
        real=torch.from_numpy(real),
        state=state,
    )


def choose_caption(captions: tuple[Caption, ...], weights: dict[str, float], random: np.random.Generator) -> str:
    """One of a sample's captions, drawn by its language's weight; the first where all weigh nothing."""
    weight = np.array([weights.get(caption.language, 1.0) for caption in captions])
    draw = random.random()  # always one draw, so that what follows does not depend on how many captions there are
    ends = np.cumsum(weight)
    return captions[int(np.searchsorted(ends, draw * ends[-1], side="right"))].text if ends[-1] else captions[0].text


def pixels_tensor(views: list[NDArray[np.uint8]]) -> Tensor:
    """(B, 3, height, width) uint8 whose memory is channels last, as the pictures are: no copy is made to turn them."""
    return torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)


def normalise(pixels: Tensor, mean: tuple[float, float, float], std: tuple[float, float, float]) -> Tensor:
    """uint8 pictures (B, 3, height, width) as float with the mean and deviation that the model was trained with."""
    shift = torch.tensor(mean, device=pixels.device).mul(255).view(1, 3, 1, 1)
    scale = torch.tensor(std, device=pixels.device).mul(255).reciprocal().view(1, 3, 1, 1)
    return (pixels.float() - shift) * scale


def prefetch(source: Iterator[Batch], depth: int) -> Generator[Batch, None, None]:
    """The same batches, prepared ahead by a thread; its error is raised here, and it ends when the consumer does.

    A thread is enough: decoding, resampling, tokenising and hashing all release the interpreter's lock.
    """
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)  # None: the source has ended
    stopped = threading.Event()

    def offer(item: Batch | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def produce() -> None:
        try:
            for batch in source:
                if not offer(batch):
                    return
            offer(None)
        except BaseException as error:  # whatever it is belongs to the consumer, who would otherwise wait for ever
            offer(error)

    threading.Thread(target=produce, name="mmflow-loader", daemon=True).start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                return
            yield item
    finally:
        stopped.set()
