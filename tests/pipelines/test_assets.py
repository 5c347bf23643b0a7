"""What a failed stage says, out of what Dagster and Ray wrap it in."""

from __future__ import annotations

from mmflow.core.errors import TrainingError
from pipelines.assets import cause_of


def wrapped(cause: BaseException) -> BaseException:
    error = RuntimeError("a step failed")
    error.__cause__ = cause
    return error


def test_a_stage_s_own_error_is_found() -> None:
    error = TrainingError("no last step")
    assert cause_of(wrapped(wrapped(error))) is error
    assert cause_of(wrapped(ValueError("a bug"))) is None


def test_causes_in_a_ring_have_an_end() -> None:
    first, second = RuntimeError("of the second"), RuntimeError("of the first")
    first.__cause__, second.__cause__ = second, first
    assert cause_of(wrapped(first)) is None
