"""The base of every section of a recipe: unknown keys are errors, values cannot change, docstrings are the help."""

from __future__ import annotations

from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict

from mmflow.core.storage import local_path

OPERATIONAL: Final = "operational"
"""Marks a setting of how a thing is made, such as `num_workers: Annotated[int, OPERATIONAL] = 1`, or that an error
advises to change: a run with another value must continue from the last checkpoint, not begin anew. A path to an input
is one too, because the stage takes a fingerprint of the content instead."""


def absolute(uri: str) -> str:
    """The URI with a relative path made absolute."""
    path = local_path(uri)
    return uri if path is None else str(path)


Uri = Annotated[str, AfterValidator(absolute)]
"""A path, made absolute because workers run in another folder, or a remote URI."""


class Config(BaseModel):
    """Settings owned by the package that reads them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    def identity(self) -> dict[str, Any]:
        """The settings that decide what is made, as JSON values: those marked OPERATIONAL are left out."""
        left_out = {name for name, field in type(self).model_fields.items() if OPERATIONAL in field.metadata}
        fields = self.model_dump(mode="json", exclude=left_out)
        return {name: _identity(getattr(self, name), value) for name, value in fields.items()}


def _identity(value: Any, dumped: Any) -> Any:
    if isinstance(value, Config):
        return value.identity()
    if isinstance(value, list | tuple):
        return [_identity(*pair) for pair in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _identity(value[key], dumped[key]) for key in dumped}
    return dumped
