"""`make bench`: mmflow compared with its peers, written to RESULTS.md; or `python -m tests.benchmarks NAME` for one."""

from __future__ import annotations

import argparse
import importlib
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

from tests.benchmarks import peers
from tests.benchmarks.measure import RUNS, SHARE, machine
from tests.benchmarks.table import publish

SUBJECTS = (
    "build", "cached_teacher", "distillation", "duplicates", "evaluation", "memory", "plan", "reading", "resume",
    "samples", "scoring", "step", "tars", "tiled", "workers",
)  # fmt: skip
RESULTS = Path(__file__).with_name("RESULTS.md")


def foot(name: str, subject: ModuleType, seconds: float) -> str:
    """What a reader needs to judge the figures of a subject, or to measure them again."""
    versions = [f"{package} {version(package)}" for package in ("mmflow", *subject.VERSIONS)]
    versions += [f"{package} {peers.version(package)}" for package in subject.PEERS]
    share = "" if SHARE == 1 else f" **Tried out on {SHARE:.1%} of the sets: no figures to quote.**"
    when = f"rounds: {getattr(subject, 'ROUNDS', RUNS)}, {seconds / 60:.1f} minutes, {datetime.now(UTC):%Y-%m-%d}"
    return f"`python -m tests.benchmarks {name}`, {when}; {machine()}; {', '.join(versions)}.{share}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="NAME", help=f"{', '.join(SUBJECTS)}; all where none is given")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    options = parser.parse_args()
    unknown = sorted(set(options.subjects) - set(SUBJECTS))
    if unknown:
        parser.error(f"{unknown[0]!r} is no subject; there are {', '.join(SUBJECTS)}")
    for name in options.subjects or SUBJECTS:
        print(f"{name}:", flush=True)
        subject = importlib.import_module(f"tests.benchmarks.{name}")
        began = time.monotonic()
        rows = subject.run()
        publish(options.results, name, rows, foot(name, subject, time.monotonic() - began))


if __name__ == "__main__":
    main()
