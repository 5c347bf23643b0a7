"""The promote section of a recipe: what a challenger must show before it takes the champion's place."""

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from mmflow.core.config import Config

# MLflow refuses "/" and ":" in a registered name, and a quote would end the string in its search filters.
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]


class PromoteConfig(Config):
    """Bounds are finite numbers, because a bound of NaN or minus infinity would make a gate that cannot refuse."""

    model: ModelName
    """Registered model whose `champion` alias may move."""
    candidate: Literal["student", "teacher"] = "student"
    """Which of the night's two models stands as challenger."""
    metric: str = Field(pattern=r"^[^/]+/[^/]+/.+$")
    """The deciding metric, such as `unseen_variants/text_to_image/R@1`. More is better, unless it ends in _rank, loss
    or perplexity."""
    min_gain: FiniteFloat = 0.0
    """How much better than the champion the challenger must be. 0 promotes an equal; less than 0 tolerates a loss."""
    floors: dict[str, FiniteFloat] = Field(default_factory=dict)
    """Metric to the worst value admitted: the least, or the most for a metric of which less is better."""
    max_drop: dict[str, Annotated[FiniteFloat, Field(ge=0)]] = Field(default_factory=dict)
    """Metric to the most by which it may be worse than the champion's."""
