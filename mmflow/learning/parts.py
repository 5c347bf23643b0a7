"""Which parts of a model are trained: one that nothing trains would be packaged as it was drawn, and taken for more."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from mmflow.core.errors import RecipeError
from mmflow.learning.config import AnsweringConfig, ObjectivesConfig
from mmflow.models.config import ModelConfig

# Part → what trains it. Parts that lie before these, encoders and a fusion, exist only where one of these reads them.
TRAINED_BY = {
    "embedding_width": ("contrastive", "sigmoid"),
    "bias": ("sigmoid",),
    "decoder": ("captioning", "answering by generation"),
    "matching": ("matching",),
    "masked_language": ("masked_language",),
    "masked_image": ("masked_image",),
    "classes": ("classification", "answering by classes"),
}


def check_trained(
    key: str, config: ModelConfig, tasks: Sequence[ObjectivesConfig], taught: Collection[str] = ()
) -> None:
    """Raise RecipeError naming the part that no objective of any task trains. `key` is the recipe's section; `taught`
    are parts that something else trains, as a teacher's losses do."""
    named = {
        f"{name} by {section.by}" if isinstance(section, AnsweringConfig) else name
        for objectives in tasks
        for name, section in objectives.named.items()
    }
    settings = {"embedding_width": config.embedding_width, "bias": config.bias, "decoder": config.decoder}
    parts = {name: f"{key}.model.{name}" for name, value in settings.items() if value is not None}
    parts |= {head: f"{key}.model.heads: {head}" for head in config.heads}
    for part, place in parts.items():
        if part not in taught and named.isdisjoint(TRAINED_BY[part]):
            remedy = "set it to null" if part == "embedding_width" else "leave it out"
            raise RecipeError(
                f"{place}: no objective trains it; name {' or '.join(TRAINED_BY[part])} under {key}.objectives, or "
                f"{remedy}"
            )
