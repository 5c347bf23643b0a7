"""The peers' own environment: img2dataset asks for other versions of packages than mmflow does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import CORES, SCRATCH, Finished, run_command

PINS = Path(__file__).with_name("peers.txt")
ENVIRONMENT = SCRATCH / "peers"


def version(package: str) -> str:
    """The pinned version of a peer."""
    lines = PINS.read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.lower().startswith(f"{package.lower()}=="))


def python() -> Path:
    """The peers' interpreter, installed at the first call. Raises RuntimeError if pip cannot install them."""
    done = ENVIRONMENT / "installed.txt"
    if not done.exists() or done.read_text() != PINS.read_text():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        print(f"installing the peers into {ENVIRONMENT} (a minute, once)", flush=True)
        run_command([sys.executable, "-m", "venv", str(ENVIRONMENT)])
        pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        run_command([*pip, "--requirement", str(PINS)])
        done.write_text(PINS.read_text())
    return ENVIRONMENT / "bin" / "python"


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


def call_peer(program: str, **arguments: Any) -> Any:
    """What a program of peers_programs.py prints as JSON, run by the peers' interpreter."""
    script = Path(__file__).with_name("peers_programs.py")
    found = subprocess.run(
        [str(python()), str(script), program, json.dumps(arguments)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(found.stdout.splitlines()[-1])
