"""A dual encoder of CLIP's size on one GPU, without Ray: `python -m tests.benchmarks.gpu`.

Samples a second and the share of the GPU's peak, the largest batch, compiled or not, and InfoNCE in strips beside the
whole matrix; written to RESULTS.md beside this file.
"""

from __future__ import annotations

import argparse
import time
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch

from tests.benchmarks.gpu.train import LONGEST_SEARCH, SIZES
from tests.benchmarks.measure import RUNS, call, rounds
from tests.benchmarks.table import Row, bounded, faster, publish
from tests.benchmarks.tiled import MOST_MEMORY_PERCENT, MOST_TIME, WIDTH

RESULTS = Path(__file__).with_name("RESULTS.md")
MFU_GOAL_PERCENT = 50.0
INFO_NCE_ROWS = 32_768
VERSIONS = ("torch", "deepspeed", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.gpu", description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="vit_b_16", help="the towers; tiny tries it out")
    parser.add_argument("--batch", type=int, default=512, help="rows of a step while speed is measured")
    parser.add_argument("--rows", type=int, default=INFO_NCE_ROWS, help="of InfoNCE alone")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    options = parser.parse_args()
    measures = {
        "steps": partial(steps, options.size, options.batch),
        "largest_batch": partial(largest_batch, options.size, options.batch),
        "contrastive": partial(contrastive, options.rows),
    }
    for name, measure in measures.items():
        print(f"{name}:", flush=True)
        began = time.monotonic()
        publish(options.results, name, measure(), foot(time.monotonic() - began))


def foot(seconds: float) -> str:
    """What a reader needs to judge the figures, or to measure them again."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: tried out, no figures to quote"
    versions = ", ".join(f"{package} {version(package)}" for package in ("mmflow", *VERSIONS))
    when = f"rounds: {RUNS}, {seconds / 60:.1f} minutes, {datetime.now(UTC):%Y-%m-%d}"
    return f"`python -m tests.benchmarks.gpu`, {when}; {device}; {versions}."


def steps(size: str, batch: int) -> list[Row]:
    """Whole training steps, as written and compiled."""
    shares: dict[bool, list[float]] = {False: [], True: []}

    def rate(compiled: bool) -> float:
        found = call("tests.benchmarks.gpu.train:training_steps", size=size, batch=batch, compiled=compiled)
        shares[compiled].append(100 * (found["share_of_peak"] or 0.0))
        return float(found["samples_per_second"])

    rates = rounds({"as written": partial(rate, False), "compiled": partial(rate, True)})
    note = f"{size}, bf16, batch {batch}"
    best = max(sorted(each)[len(each) // 2] for each in shares.values())
    return [
        faster("training step, compiled", rates["compiled"], "as written", rates["as written"], note=note),
        Row(name="share of the GPU's peak (MFU), the better of both", ours=best, unit="%",
            goal=f"≥ {MFU_GOAL_PERCENT:g}", met=best >= MFU_GOAL_PERCENT, note=note),
    ]  # fmt: skip


def largest_batch(size: str, batch: int) -> list[Row]:
    """The last batch that fits, doubling; and with activations computed again in the backward pass."""
    rows = []
    for name, checkpointed in (("activations kept", False), ("activation checkpointing", True)):
        fits = 0
        for doubling in range(LONGEST_SEARCH):
            found = call(
                "tests.benchmarks.gpu.train:fits", size=size, batch=batch << doubling, checkpointed=checkpointed
            )
            print(f"  {name}: {batch << doubling:,}: {'fits' if found else 'does not fit'}", flush=True)
            if not found:
                break
            fits = batch << doubling
        rows.append(Row(name=f"largest batch, {name}", ours=fits, unit="rows", note=f"{size}, bf16, doubled"))
    return rows


def contrastive(rows: int) -> list[Row]:
    """The loss alone, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    programs = {
        name: partial(call, f"tests.benchmarks.tiled:{name}", batch=rows, device=device)
        for name in ("in_strips", "dense")
    }
    peaks: dict[str, list[float]] = {name: [] for name in programs}

    def rate(name: str) -> float:
        found = programs[name]()
        peaks[name].append(found["bytes"])
        return rows / float(found["seconds"])

    rates = rounds({name: partial(rate, name) for name in programs})
    note = f"{rows:,} × {WIDTH}, fp32"
    shares = [100 * ours / max(theirs, 1) for ours, theirs in zip(peaks["in_strips"], peaks["dense"], strict=True)]
    peer = "transformers' CLIP loss"
    return [
        faster("InfoNCE: forward and backward", rates["in_strips"], peer, rates["dense"], unit="pairs/s",
               goal=round(1 / MOST_TIME, 2), note=note),
        bounded("InfoNCE: peak memory, share of the dense", shares, unit="%", most=MOST_MEMORY_PERCENT, note=note),
    ]  # fmt: skip


if __name__ == "__main__":
    main()
