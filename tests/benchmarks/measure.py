"""Runs in fresh processes, in turn, with the time they took and the memory that their processes reached."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
SCRATCH = ROOT / "workspace" / "bench"
RUNS = int(os.environ.get("MMFLOW_BENCH_RUNS", "5"))
SHARE = float(os.environ.get("MMFLOW_BENCH_SHARE", "1"))  # of every set: 0.01 tries the programs out in minutes
CORES = 2
POLL_SECONDS = 0.1
RESULT = "result: "


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that has ended well."""

    seconds: float
    stdout: str
    peaks: Mapping[int, tuple[bool, int]] = field(default_factory=dict)  # process → is it Ray's worker, its peak bytes


def rounds(contestants: Mapping[str, Callable[[], float]], runs: int = RUNS) -> dict[str, list[float]]:
    """Every contestant's figure in each round. They take turns, so that a slow minute of the machine is everybody's."""
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(runs):
        for name, contestant in contestants.items():
            figures[name].append(contestant())
            print(f"  round {number + 1} of {runs}: {name}: {figures[name][-1]:,.4g}", flush=True)
    return figures


def run_command(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, watch: bool = False, log: Path | None = None
) -> Finished:
    """Run to the end. Raises RuntimeError with the last lines of its output if it fails."""
    log = log or SCRATCH / "last.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    peaks: dict[int, tuple[bool, int]] = {}
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        began = time.perf_counter()
        process = subprocess.Popen(command, env={**os.environ, **(env or {})}, stdout=output, stderr=subprocess.STDOUT)
        ended = threading.Event()
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
        if watch:
            watcher.start()
        code = process.wait()
        seconds = time.perf_counter() - began
        ended.set()
        if watch:
            watcher.join()
        output.seek(0)
        text = output.read()
    if code:
        raise RuntimeError(f"{' '.join(command)[:300]}: exit code {code}\n{text[-2000:]}")
    return Finished(seconds=seconds, stdout=text, peaks=peaks)


def call(function: str, **arguments: Any) -> Any:
    """What `module:function` of `tests.benchmarks` returns for JSON arguments, called in a fresh process."""
    passed = SCRATCH / "arguments.json"  # a command line holds 128 KiB, a list of 8,000 paths is a megabyte
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.write_text(json.dumps(arguments))
    command = [sys.executable, "-m", "tests.benchmarks.measure", function, str(passed)]
    lines = run_command(command).stdout.splitlines()
    # Not the last line: Ray has more to say while it goes.
    return json.loads(next(line for line in reversed(lines) if line.startswith(RESULT)).removeprefix(RESULT))


def rate_after_start(many: tuple[int, float], few: tuple[int, float]) -> float:
    """Rows a second of a run over many rows and one over few, each (rows, seconds): what both take to start cancels."""
    return (many[0] - few[0]) / (many[1] - few[1])


def mmflow(*arguments: str, watch: bool = False) -> Finished:
    """The command line, as a user runs it."""
    return run_command([sys.executable, "-m", "mmflow.cli.main", *arguments], watch=watch)


def warm(paths: Sequence[Path]) -> None:
    """Read the files, so that the first contestant does not pay for the disk."""
    for path in paths:
        path.read_bytes()


def machine() -> str:
    """The machine in words, without its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores of {' '.join(model.split())}, {memory:.0f} GiB, Python {platform.python_version()}"


def high_water_mark(pid: int | str = "self") -> int:
    """The most bytes that a process was resident. Not getrusage's, which begins with the parent's.

    Raises OSError for a process that is gone and KeyError for a zombie.
    """
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines if ":" in line)["VmHWM"].split()[0]) * 1024


def _watch(pid: int, peaks: dict[int, tuple[bool, int]], ended: threading.Event) -> None:
    """Note the high-water mark of every process that descends from `pid`, and which of them are Ray's workers."""
    while not ended.wait(POLL_SECONDS):
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
                with contextlib.suppress(OSError, KeyError, psutil.Error):
                    worker, peak = peaks.get(process.pid, (False, 0))
                    worker |= "".join(process.cmdline()[:1]).startswith("ray::")  # renamed after its task
                    peaks[process.pid] = (worker, max(peak, high_water_mark(process.pid)))


if __name__ == "__main__":
    module, _, name = sys.argv[1].partition(":")
    print(
        RESULT
        + json.dumps(getattr(importlib.import_module(module), name)(**json.loads(Path(sys.argv[2]).read_text()))),
        flush=True,
    )
