"""The peers' own environments: img2dataset and clip-retrieval ask for other versions than mmflow and each other do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import CORES, SCRATCH, Finished, run_command

PINS = {name: Path(__file__).with_name(f"{name}.txt") for name in ("peers", "peers_clip_retrieval")}
_CLIP_MODELS = SCRATCH / "clip-models"


def version(package: str) -> str:
    """The pinned version of a peer, in the first environment that has it."""
    lines = [line for pins in PINS.values() for line in pins.read_text().splitlines()]
    return next(line.partition("==")[2] for line in lines if line.lower().startswith(f"{package.lower()}=="))


def python(name: str = "peers") -> Path:
    """An environment's interpreter, installed at the first call. Raises RuntimeError if pip cannot install it."""
    pins, environment = PINS[name].read_text(), SCRATCH / name
    done = environment / "installed.txt"
    if not done.exists() or done.read_text() != pins:
        shutil.rmtree(environment, ignore_errors=True)
        print(f"installing {name} into {environment} (minutes, once)", flush=True)
        run_command([sys.executable, "-m", "venv", str(environment)])
        pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        run_command([*pip, "--requirement", str(PINS[name])])
        done.write_text(pins)
    return environment / "bin" / "python"


def img2dataset(table: Path, output: Path, *, side: int, quality: int, max_pixels: int) -> Finished:
    """Run img2dataset over a Parquet table of `url` (file:// addresses, which its urllib reads) and `caption`."""
    options = {
        "url_list": table,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_format": "webdataset",
        "output_folder": output,
        "processes_count": CORES,
        "thread_count": 16,
        "number_sample_per_shard": 500,  # a shard is a process's work: of 10,000, one process would do it all
        "image_size": side,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_format": "jpg",
        "encode_quality": quality,
        "min_image_size": 16,
        "max_aspect_ratio": 8,
        "max_image_area": max_pixels,
    }
    command = [str(python().parent / "img2dataset"), *(f"--{name}={value}" for name, value in options.items())]
    # It looks at `max_image_area` after decoding: 29,700 × 20,990 RGBA pixels as float64 are 15 GB. OpenCV can refuse
    # them from their header. Albumentations would ask its home for a newer version.
    limits = {"OPENCV_IO_MAX_IMAGE_PIXELS": str(max_pixels), "NO_ALBUMENTATIONS_UPDATE": "1"}
    return run_command(command, env=limits)


def clip_retrieval_model(config: dict[str, Any], name: str) -> str:
    """The name by which clip-retrieval finds an open_clip model of this configuration, with random weights; made once.

    Nothing can be downloaded by a benchmark, and weights change no speed.
    """
    description, weights = _CLIP_MODELS / f"{name}.json", _CLIP_MODELS / f"{name}.pt"
    if not weights.exists() or json.loads(description.read_text()) != config:
        weights.unlink(missing_ok=True)
        _CLIP_MODELS.mkdir(parents=True, exist_ok=True)
        description.write_text(json.dumps(config))
        _run_clip_retrieval("weights", name, str(weights.with_suffix(".staged")))
        weights.with_suffix(".staged").rename(weights)
    return f"open_clip:{name}/{weights}"  # as clip-retrieval's author says in its issue 372


def clip_retrieval(shards: Path, output: Path, *, model: str, batch: int, count: int) -> float:
    """Embed a folder of tars; samples a second from the first batch read to the last embedded, by its own statistics.

    So its imports, the loading of the model, its warm-up, and the writing of the embeddings at the end are not counted.
    Raises RuntimeError if it did not embed `count` samples.
    """
    tars = sorted(path.stem for path in shards.glob("*.tar"))
    options = {
        "input_dataset": f"{shards}/{{{tars[0]}..{tars[-1]}}}.tar",
        "input_format": "webdataset",
        "output_folder": output,
        "clip_model": model,
        "batch_size": batch,
    }
    _run_clip_retrieval("inference", *(f"--{name}={value}" for name, value in options.items()))
    (statistics,) = (json.loads(path.read_text()) for path in (output / "stats").glob("*.json"))
    if statistics["sample_count"] != count:
        raise RuntimeError(f"clip-retrieval counts {statistics['sample_count']} of {count} samples")
    return float(count / statistics["total_duration"])


def _run_clip_retrieval(*arguments: str) -> None:
    command = [str(python("peers_clip_retrieval")), str(Path(__file__).with_name("peers_clip_retrieval.py"))]
    run_command([*command, *arguments], env={"OPEN_CLIP_MODELS": str(_CLIP_MODELS)})


def call_peer(program: str, **arguments: Any) -> Any:
    """What a program of peers_programs.py prints as JSON, run by the peers' interpreter."""
    script = Path(__file__).with_name("peers_programs.py")
    found = subprocess.run(
        [str(python()), str(script), program, json.dumps(arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])
