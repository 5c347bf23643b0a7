"""An evaluation of many held-out rows: seconds on two cores compared with one, and the memory of its processes."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial
from typing import Any

from tests.benchmarks import data
from tests.benchmarks.measure import CORES, RESULT, SCRATCH, SHARE, call, rounds, run_command
from tests.benchmarks.table import Row, bounded, faster

ROWS, MANY_ROWS, ROWS_PER_SHARD, SIDE, WIDTH = 20_000, 200_000, 5_000, 32, 128
MOST_GIB, GOAL = 4.0, 1.8
PEERS = ()
VERSIONS = ("torch", "transformers", "ray", "pyarrow")


def run() -> list[Row]:
    """A small ResNet and BERT, and the same untrained; retrieval both ways; no result is there before."""
    few, many = (max(1_000, round(SHARE * rows)) for rows in (ROWS, MANY_ROWS))
    for rows in (few, many):
        call("tests.benchmarks.evaluation:prepare", rows=rows)
    found = rounds({str(cores): partial(_rate, few, cores) for cores in (CORES, 1)})
    seconds, peaks = _evaluate(many, CORES)
    note = f"{SIDE} px, two models of width {WIDTH}"
    return [
        faster(f"evaluation of {few:,} rows, {CORES} cores", found[str(CORES)], "one core", found["1"], unit="rows/s",
               goal=GOAL, note=f"{note}, Ray's start included"),
        bounded(f"evaluation of {many:,} rows: largest process", [max(peaks) / 2**30], unit="GiB", most=MOST_GIB,
                note=f"{note}; {len(peaks)} processes"),
        Row(name=f"evaluation of {many:,} rows", ours=seconds / 60, unit="minutes", note=f"{note}, {CORES} cores"),
    ]  # fmt: skip


def _rate(rows: int, cores: int) -> float:
    return rows / _evaluate(rows, cores)[0]


def _evaluate(rows: int, cores: int) -> tuple[float, list[int]]:
    """Seconds of the evaluation in a process of its own, and the peak bytes of each process."""
    arguments = SCRATCH / "evaluation.json"
    arguments.write_text(json.dumps({"rows": rows, "cores": cores}))
    measure = [sys.executable, "-m", "tests.benchmarks.measure", "tests.benchmarks.evaluation:measure", str(arguments)]
    finished = run_command(["taskset", "--cpu-list", f"0-{cores - 1}", *measure], watch=True)
    line = next(line for line in reversed(finished.stdout.splitlines()) if line.startswith(RESULT))
    return float(json.loads(line.removeprefix(RESULT))), [peak for _, peak in finished.peaks.values()]


# --- called in a process of its own -----------------------------------------------------------------------------------


def prepare(rows: int) -> None:
    """Make a dataset and a package, once."""
    from mmflow.core.storage import exists
    from mmflow.models.encoders import parameter_count
    from mmflow.models.model import build
    from mmflow.models.package import CARD, write_package
    from tests.dataset.handmade import Handmade, write_dataset

    directory = SCRATCH / f"evaluation-{rows}"
    if exists(str(directory / "package" / CARD)):
        return
    shutil.rmtree(directory, ignore_errors=True)
    samples = [
        Handmade(key=f"key-{number}", captions=[{"language": "en", "text": _caption(number)}], size=(SIDE, SIDE))
        for number in range(rows)
    ]
    starts = range(0, rows, ROWS_PER_SHARD)
    write_dataset(directory / "dataset", [("held_out", samples[start : start + ROWS_PER_SHARD]) for start in starts])
    tokenizer, config = data.tokenizer_of(str(directory / "dataset"), 500), _config()
    model = build("model", config, tokenizer.get_vocab_size(), seed=0)
    write_package(
        str(directory / "package"), state=model.state_dict(), config=config, tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model), lineage={},
    )  # fmt: skip


def measure(rows: int, cores: int) -> float:
    """Seconds of one evaluation."""
    import time

    import torch

    from mmflow.cluster.local import ensure_ray
    from mmflow.evaluation.config import EvaluateConfig
    from mmflow.evaluation.evaluate import evaluate_models

    directory = SCRATCH / f"evaluation-{rows}"
    for folder in ("results", "evaluation"):
        shutil.rmtree(directory / folder, ignore_errors=True)
    torch.set_num_threads(cores)
    began = time.perf_counter()
    ensure_ray(num_cpus=cores)
    evaluate_models(
        str(directory / "evaluation"), dataset=str(directory / "dataset"),
        packages={"teacher": str(directory / "package")},
        settings=EvaluateConfig(splits=["held_out"], num_workers=cores), seed=1, store=str(directory / "results"),
        progress=lambda done, total, note: None,
    )  # fmt: skip
    return time.perf_counter() - began


def _caption(number: int) -> str:
    return f"a picture of the number {number} and {number % 97} more"


def _config() -> Any:
    from mmflow.models.config import ModelConfig

    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    bert = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    return ModelConfig.model_validate(
        {
            "image": {"type": "resnet", "options": resnet, "pooling": "pooler"},
            "text": {"type": "bert", "options": bert | {"max_position_embeddings": 32}, "pooling": "mean"},
            "embedding_width": WIDTH,
            "image_pixels": SIDE,
            "max_tokens": 24,
        }
    )
