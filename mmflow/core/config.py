"""The base of every section of a recipe: unknown keys are errors, values cannot change, docstrings are the help."""

from pydantic import BaseModel, ConfigDict


class Config(BaseModel):
    """Settings owned by the package that reads them."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
