"""A model that begins with the weights of a package: what both have is taken, and what only one has is named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, accept_older_names
from mmflow.models.package import Package, read_vocabulary, read_weights, weight_shapes

CLASSES = "heads.classes."


@dataclass(frozen=True)
class Begun:
    """What of a model and of the package that it began with is not the other's: modules, or single tensors."""

    fresh: tuple[str, ...]  # of the model, as it was drawn
    left_out: tuple[str, ...]  # of the package


def begin(key: str, model: Model, package: Package, classes: Sequence[str]) -> Begun:
    """Take the package's weights into the model, whose head `classes` tells `classes` apart, in this order.

    That head begins anew where the package's tells others apart. `key` is the recipe's, for errors; raises as
    `check_fit` and `load_package`.
    """
    weights = read_weights(package)
    accept_older_names(weights)
    own = model.state_dict()
    check_fit(key, own, {name: tuple(each.shape) for name, each in weights.items()})
    same_classes = read_vocabulary(package)[1] == tuple(classes)
    taken = {
        name: each for name, each in weights.items() if name in own and (same_classes or not name.startswith(CLASSES))
    }
    model.load_state_dict(taken, strict=False)
    return Begun(_modules(own, taken), _modules(weights, taken))


def check_package(key: str, model: Model, package: Package) -> tuple[str, ...]:
    """What of the model is fresh that begins with a package, whose weights are not read. Raises as `check_fit`."""
    shapes, own = weight_shapes(package), model.state_dict()
    accept_older_names(shapes)
    check_fit(key, own, shapes)
    return _modules(own, shapes)


def fresh_parts(model: Model, config: ModelConfig) -> tuple[str, ...]:
    """What of the model is fresh that begins without a package: all but what encoders have of their checkpoints."""
    towers = {"image": config.image, "text": config.text}
    trained = {f"{side}." for side, each in towers.items() if each is not None and each.checkpoint is not None}
    own = model.state_dict()
    return _modules(own, {name for name in own if name.startswith(tuple(trained)) and "backbone." in name})


def check_fit(key: str, own: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise RecipeError where a tensor has one shape in the model and another in the package, and where an encoder has
    nothing of the package's. How many classes there are is the data's to say."""
    section = key.rpartition(".")[0]
    for name, tensor in own.items():
        counted = 1 if name.startswith(CLASSES) else 0
        if name in shapes and shapes[name][counted:] != tensor.shape[counted:]:
            raise RecipeError(
                f"{key}: {name} is {list(shapes[name])} in the package and {list(tensor.shape)} by {section}.model; "
                "make them equal, or leave out of the model section what differs: it is then as in the package"
            )
    for side in ("image", "text"):
        ours, theirs = ({name for name in names if name.startswith(f"{side}.")} for names in (own, shapes))
        if ours and theirs and ours.isdisjoint(theirs):
            raise RecipeError(
                f"{key}: no weight of the package's {side} encoder is one of {section}.model's; give both the same "
                "type, or leave start out"
            )


def _modules(names: Collection[str], shared: Collection[str]) -> tuple[str, ...]:
    """Those names that are not shared; where all of a module are, the module's."""
    holds_shared = {prefix for name in shared for prefix in _prefixes(name)}
    found = (next(each for each in _prefixes(name) if each not in holds_shared) for name in names if name not in shared)
    return tuple(dict.fromkeys(found))


def _prefixes(name: str) -> list[str]:
    """The modules that a tensor is in, the outermost first, and the tensor itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
