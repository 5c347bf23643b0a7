"""The base of every section of a recipe: unknown keys are errors, values cannot change, docstrings are the help."""

from __future__ import annotations

from typing import Any, Final

from pydantic import BaseModel, ConfigDict

OPERATIONAL: Final = "operational"
"""Marks a setting that says only how a thing is made, never what: `num_workers: Annotated[int, OPERATIONAL] = 1`."""


class Config(BaseModel):
    """Settings owned by the package that reads them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is made, as JSON values: those marked OPERATIONAL are left out."""
        fields = self.model_dump(mode="json")
        kept = {}
        for name, field in type(self).model_fields.items():
            if name in fields and OPERATIONAL not in field.metadata:
                kept[name] = _identity(getattr(self, name), fields[name])
        return kept


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _identity(value[key], dumped[key]) for key in dumped}
    return dumped
