"""Which checkpoints exist, which are what was written, and which are kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import CorruptArtifactError
from mmflow.training.config import CheckpointsConfig
from mmflow.training.store import (
    Saved,
    copy,
    directory_of,
    publish_part,
    remove,
    remove_from,
    remove_staging,
    saved_checkpoints,
    superfluous,
    verify,
)

RANKS = 3


def write_part(store: Path, step: int, rank: int, num_ranks: int = RANKS, state_hash: str = "1", **facts: Any) -> None:
    scratch = store / f".staging-{rank}"
    (scratch / "state").mkdir(parents=True)
    (scratch / "state" / f"optimizer-{rank}").write_bytes(bytes([rank]) * 1000)
    (scratch / f"random-{rank}.pt").write_bytes(b"random")
    known = {"step": step, "metrics": {}, **facts}
    publish_part(
        directory_of(str(store), step), scratch, rank=rank, world_size=num_ranks, state_hash=state_hash, **known
    )


def write(store: Path, step: int, num_ranks: int = RANKS, **facts: Any) -> None:
    for rank in range(num_ranks):
        write_part(store, step, rank, num_ranks, **facts)


def steps_in(store: Path) -> list[int]:
    return [each.step for each in saved_checkpoints(str(store))]


def test_a_checkpoint_exists_once_all_of_its_ranks_have_published(tmp_path: Path) -> None:
    write(tmp_path, 4)
    for rank in (2, 0, 1):
        assert steps_in(tmp_path) == [4]
        write_part(tmp_path, 8, rank)
    assert steps_in(tmp_path) == [8, 4]
    (saved, _) = saved_checkpoints(str(tmp_path))
    assert saved.world_size == RANKS
    assert sorted(saved.files) == sorted(
        [f"state/optimizer-{rank}" for rank in range(RANKS)] + [f"random-{rank}.pt" for rank in range(RANKS)]
    )
    assert saved.bytes == RANKS * (1000 + len(b"random"))
    for share in range(2):
        verify(saved, share, 2)


def test_parts_of_two_attempts_are_no_checkpoint(tmp_path: Path) -> None:
    write_part(tmp_path, 4, 0, 2, state_hash="1")
    write_part(tmp_path, 4, 1, 2, state_hash="2")
    assert steps_in(tmp_path) == []
    write_part(tmp_path, 8, 0, 2)
    write_part(tmp_path, 8, 1, 3)
    write_part(tmp_path, 8, 2, 3)
    assert steps_in(tmp_path) == []


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_kill_at_any_moment_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """At each call that changes the disk, of a rank that publishes after the others."""
    write(tmp_path / "store", 4)
    for number in range(100):
        here = tmp_path / str(number)
        shutil.copytree(tmp_path / "store", here)
        for other in set(range(RANKS)) - {rank}:
            write_part(here, 8, other)
        with monkeypatch.context() as patched:
            calls: list[str] = []
            for name in ("os.replace", "os.fsync", "shutil.rmtree"):
                patched.setattr(name, dying(name, number, calls))
            try:
                write_part(here, 8, rank)
            except KeyboardInterrupt:
                found = saved_checkpoints(str(here))
                for each in found:
                    verify(each)
                assert [each.step for each in found] in ([4], [8, 4])
                continue
        assert steps_in(here) == [8, 4]
        assert number > 4
        return
    raise AssertionError("never whole")


def dying(name: str, last: int, calls: list[str]) -> Callable[..., Any]:
    """The function, which raises what nothing catches at the call after the `last` of them all."""
    module, _, attribute = name.partition(".")
    real = getattr({"os": os, "shutil": shutil}[module], attribute)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > last:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return call


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "gone"),
        (lambda path: path.write_bytes(b"short"), "5 bytes, 1000 were written"),
        (lambda path: path.write_bytes(b"x" * 1000), "not the bytes that were written"),
    ],
)
def test_a_file_that_is_not_what_was_written_is_named(tmp_path: Path, damage: Callable[[Path], Any], said: str) -> None:
    write(tmp_path, 4)
    path = tmp_path / "step-00000004" / "state" / "optimizer-1"
    damage(path)
    (saved,) = saved_checkpoints(str(tmp_path))
    found = []
    for share in range(2):
        try:
            verify(saved, share, 2)
        except CorruptArtifactError as error:
            found.append(str(error))
    (message,) = found
    assert message.startswith(f"{path}: {said}")


def test_a_checkpoint_half_removed_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    path = tmp_path / "step-00000004"
    for part in sorted(path.glob("part-*")):
        part.unlink()
        assert steps_in(tmp_path) == [8]
    remove(str(path))
    remove(str(path))
    assert not path.exists()


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    losses = {4: 2.0, 8: 0.5, 12: 3.0, 16: 0.7, 20: 1.0}
    for step, loss in losses.items():
        write(tmp_path, step, metrics={"loss": loss, "R@1": loss} if step != 12 else {})
    found = saved_checkpoints(str(tmp_path))

    def removed(**changes: Any) -> list[int]:
        return [saved.step for saved in superfluous(found, CheckpointsConfig(**changes))]

    assert removed() == [12, 8, 4]
    assert removed(keep_best=1) == [12, 4]
    assert removed(keep_best=2) == [12, 4]  # 8 and 16, which is kept anyway
    assert removed(keep_best=1, best_metric="R@1") == [12, 8]
    assert removed(keep_last=1, keep_best=1, best_metric="recall") == [16, 12, 8, 4]


def test_what_was_refused_or_left_half_written_makes_room(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    (tmp_path / ".staging-7" / "state").mkdir(parents=True)
    remove_from(str(tmp_path), 8)
    remove_staging(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_store_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert saved_checkpoints(str(tmp_path / "nowhere")) == []
    remove_from(str(tmp_path / "nowhere"), 0)


def test_files_are_brought_to_another_machine(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    (saved,) = saved_checkpoints(str(tmp_path / "store"))
    copy(saved, tmp_path / "here")
    verify(Saved(str(tmp_path / "here"), saved.parts))
