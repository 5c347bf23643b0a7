"""Which checkpoints exist, are damaged or are kept, and the hash of a state. `test_loop` and `test_faults` load one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import CorruptArtifactError
from mmflow.training import zero
from mmflow.training.checkpoint_store import (
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
from mmflow.training.checkpoints import Checkpoints
from mmflow.training.config import CheckpointsConfig
from mmflow.training.journal import Journal, journal_at
from mmflow.training.zero import element_hash

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


def at(store: Path, step: int) -> Path:
    return Path(directory_of(str(store), step))


def steps_in(store: Path) -> list[int]:
    return [saved.step for saved in saved_checkpoints(str(store))]


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
    """The rank that publishes last dies at each call that changes the disk."""
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
                existing = saved_checkpoints(str(here))
                for saved in existing:
                    verify(saved)
                assert [saved.step for saved in existing] in ([4], [8, 4])
                continue
        assert steps_in(here) == [8, 4]
        assert number > 4
        return
    raise AssertionError("never whole")


def dying(name: str, last: int, calls: list[str]) -> Callable[..., Any]:
    """The function; the call after number `last` of all calls raises what nothing catches."""
    module, _, attribute = name.partition(".")
    real = getattr({"os": os, "shutil": shutil}[module], attribute)

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) > last:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    return call


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "gone": lambda path: path.unlink(),
    "5 bytes, 1000 were written": lambda path: path.write_bytes(b"short"),
    "not the bytes that were written": lambda path: path.write_bytes(b"x" * 1000),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_file_is_named_by_the_rank_that_reads_it(tmp_path: Path, message: str) -> None:
    write(tmp_path, 4)
    path = at(tmp_path, 4) / "state" / "optimizer-1"
    DAMAGES[message](path)
    (saved,) = saved_checkpoints(str(tmp_path))
    errors = []
    for share in range(2):
        try:
            verify(saved, share, 2)
        except CorruptArtifactError as error:
            errors.append(str(error))
    (error,) = errors
    assert error.startswith(f"{path}: {message}")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("message", DAMAGES)
def test_training_stops_if_its_only_checkpoint_is_damaged(one_rank: None, tmp_path: Path, message: str) -> None:
    write(tmp_path, 4, num_ranks=1)
    DAMAGES[message](at(tmp_path, 4) / "state" / "optimizer-0")
    journal = Journal(tmp_path / "journal.jsonl")
    with pytest.raises(CorruptArtifactError, match=r"none of its 1 checkpoints can be used.*delete the directory"):
        list(Checkpoints(str(tmp_path), CheckpointsConfig(), journal).newest())
    (line,) = journal_at(str(tmp_path / "journal.jsonl"))
    assert (line["event"], line["step"]) == ("refused", 4)
    assert line["reason"].startswith(f"rank 0: {at(tmp_path, 4)}/state/optimizer-0: {message}")


def test_a_checkpoint_half_removed_does_not_exist(tmp_path: Path) -> None:
    write(tmp_path, 4)
    write(tmp_path, 8)
    path = at(tmp_path, 4)
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
    existing = saved_checkpoints(str(tmp_path))

    def removed(**changes: Any) -> list[int]:
        return [saved.step for saved in superfluous(existing, CheckpointsConfig(**changes))]

    assert removed() == [12, 8, 4]
    assert removed(keep_best=1) == [12, 4]
    assert removed(keep_best=2) == [12, 4]  # 8 and 16, which is kept anyway
    assert removed(keep_best=1, best_metric="R@1") == [12, 8]
    assert removed(keep_last=1, keep_best=1, best_metric="recall") == [16, 12, 8, 4]


def test_refused_checkpoints_and_half_written_files_are_removed(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(tmp_path, step)
    (tmp_path / ".staging-7" / "state").mkdir(parents=True)
    remove_from(str(tmp_path), 8)
    remove_staging(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [at(tmp_path, 4).name]


def test_a_missing_store_has_no_checkpoints(tmp_path: Path) -> None:
    assert saved_checkpoints(str(tmp_path / "nowhere")) == []
    remove_from(str(tmp_path / "nowhere"), 0)


def test_files_are_brought_to_another_machine(tmp_path: Path) -> None:
    write(tmp_path / "store", 4)
    (saved,) = saved_checkpoints(str(tmp_path / "store"))
    copy(saved, tmp_path / "here")
    verify(Saved(str(tmp_path / "here"), saved.parts))


# --- the hash of a state --------------------------------------------------------------------------------------------


@given(cuts=st.lists(st.integers(0, 100), max_size=6), chunk=st.sampled_from([7, 64, 1 << 20]))
def test_hashes_of_parts_of_a_tensor_add_up_to_the_hash_of_the_whole(cuts: list[int], chunk: int) -> None:
    values = torch.randn(100)
    whole = element_hash("a", values, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero, "CHUNK", chunk)  # elements hashed at once
        parts = [element_hash("a", values[start:stop], start) for start, stop in pairwise([0, *sorted(cuts), 100])]
    assert torch.stack(parts).sum() == whole


def test_values_places_and_names_change_the_hash() -> None:
    values = torch.randn(100)
    swapped, nudged = values.clone(), values.clone()
    swapped[[3, 4]] = values[[4, 3]]
    nudged[7] = torch.nextafter(values[7], torch.tensor(9.0))
    cases = (("a", values, 0), ("a", swapped, 0), ("a", nudged, 0), ("a", values, 1), ("b", values, 0))
    assert len({int(element_hash(*case)) for case in cases}) == len(cases)
