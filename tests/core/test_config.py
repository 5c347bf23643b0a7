"""Which settings decide what is made."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config


class Inner(Config):
    width: int = 2
    workers: Annotated[int, OPERATIONAL] = 1


class Outer(Config):
    inner: Inner = Inner()
    several: list[Inner] = Field(default_factory=lambda: [Inner()])
    named: dict[str, Inner] = Field(default_factory=lambda: {"a": Inner()})
    seconds: Annotated[float | None, OPERATIONAL] = None


def test_operational_settings_are_no_part_of_the_identity_at_any_depth() -> None:
    changed = Outer(inner=Inner(workers=8), several=[Inner(workers=8)], named={"a": Inner(workers=8)}, seconds=3)
    kept = {"width": 2}
    assert changed.identity() == Outer().identity() == {"inner": kept, "several": [kept], "named": {"a": kept}}
    assert Outer(inner=Inner(width=3)).identity() != Outer().identity()
