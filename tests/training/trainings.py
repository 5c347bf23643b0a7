"""Whole trainings of a small dataset by real ranks, and the files that they write."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers

from mmflow.dataset.opened import Dataset
from mmflow.training.journal import journal_at
from tests.dataset.handmade import Handmade, write_dataset
from tests.training.faulty_ranks import BATCH, EPOCHS, EVERY
from tests.training.ranks import ROOT, furthest

SAMPLES = (9, 14, 8)  # of each shard
STEPS_PER_EPOCH = -(-sum(SAMPLES) // BATCH)
STEPS = EPOCHS * STEPS_PER_EPOCH
LAST_SAVED = (STEPS - 1) // EVERY * EVERY
STAGES = (1, 2, 3)


class Trainings:
    """A directory with a dataset, and the trainings of it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs = 0
        self.dataset = dataset_in(directory)
        self.tokenizer = directory / "tokenizer.json"
        words = [f"picture-{number}" for number in range(sum(SAMPLES))]
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        tokenizer = Tokenizer(
            models.WordLevel({word: id for id, word in enumerate(special + words)}, unk_token="[UNK]")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.add_special_tokens(special)
        tokenizer.save(str(self.tokenizer))

    def run(self, num_ranks: int, *plans: dict[str, Any], dies: bool = False, exchange_seconds: float = 60) -> None:
        """Run the trainings. With `dies` a rank dies on purpose, so the others are only waited for briefly."""
        self.runs += 1
        shared = {"dataset": self.dataset.uri, "tokenizer": str(self.tokenizer)}
        text = json.dumps([{**shared, **plan} for plan in plans])
        environment = {
            **os.environ,
            "RENDEZVOUS": f"rendezvous-{self.runs}",
            "EXCHANGE_SECONDS": str(exchange_seconds),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "tests.training.faulty_ranks"]
        logs = [self.directory / f"log-{self.runs}-{rank}" for rank in range(num_ranks)]
        ranks = []
        for rank, log in enumerate(logs):
            arguments = [*command, str(rank), str(num_ranks), str(self.directory), text]
            with log.open("w") as stream:
                ranks.append(subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=stream, stderr=stream))
        try:
            codes = [ranks[0].wait(timeout=900)]
            with contextlib.suppress(subprocess.TimeoutExpired) if dies else contextlib.nullcontext():
                codes += [rank.wait(timeout=exchange_seconds + 10 if dies else 900) for rank in ranks[1:]]
        finally:
            for rank in ranks:
                rank.kill()
        if not dies:
            assert codes == [0] * num_ranks, "\n".join(log.read_text()[-3000:] for log in logs)

    def copy(self, source: str, target: str, *, without: tuple[str, ...] = ("package",)) -> Path:
        """A copy of a training as far as it has come."""
        shutil.copytree(self.directory / source, self.directory / target, ignore=shutil.ignore_patterns(*without))
        return self.directory / target

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.directory / name / "package" / "model.safetensors")

    def error(self, name: str) -> str:
        """The error of rank 0; empty if the training succeeded."""
        return (self.directory / name / "error-0.txt").read_text()

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        return [line for line in journal_at(str(self.directory / name / "journal.jsonl")) if line.get("event") == kind]

    def seen(self, name: str) -> dict[int, list[str]]:
        """Step → keys over all ranks and all attempts at the step."""
        keys_by_step: dict[int, list[str]] = {}
        for path in sorted((self.directory / name).glob("seen-*.jsonl")):
            for line in map(json.loads, path.read_text().splitlines()):
                keys_by_step.setdefault(line["step"], []).extend(line["keys"])
        return keys_by_step


def dataset_in(directory: Path) -> Dataset:
    shards, number = [], 0
    for samples in SAMPLES:
        rows = [
            Handmade(key=f"key-{sample}", captions=[{"language": "en", "text": f"picture-{sample}"}], size=(24, 24))
            for sample in range(number, number + samples)
        ]
        shards.append(("train", rows))
        number += samples
    return write_dataset(directory / "dataset", shards)


def largest_difference(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    return furthest(first, second, without=("key.bias", "k_proj.bias"))


def assert_each_sample_once_an_epoch(seen: dict[int, list[str]]) -> None:
    """A step has the same samples, no matter how often and by how many ranks it was taken."""
    everything = sorted(f"key-{number}" for number in range(sum(SAMPLES)))
    assert sorted(seen) == list(range(1, STEPS + 1))
    for epoch in range(EPOCHS):
        steps = range(epoch * STEPS_PER_EPOCH + 1, (epoch + 1) * STEPS_PER_EPOCH + 1)
        assert sorted(key for step in steps for key in set(seen[step])) == everything


def cut(path: Path) -> None:
    """Cut a file short."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn(path: Path) -> None:
    """Turn a bit of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
