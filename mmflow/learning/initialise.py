"""A student that begins with weights of its teacher: whole layers of a deeper one, units of a wider one (Weight
Selection, arXiv 2311.18823).

Which units are taken follows from the two widths alone, so that all that read or write the same vectors take the same.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from mmflow.core.errors import RecipeError
from mmflow.learning.distillation import InitialiseConfig
from mmflow.models.model import Model


def initialise(key: str, student: Model, teacher: Model, config: InitialiseConfig) -> list[str]:
    """Copy what fits into the student; the names of its tensors that keep what they were drawn with.

    A tensor is copied where the teacher has one of that name, its layers chosen, and of the same or greater widths; of
    positions the first are taken. `key` is the recipe's, for errors. Raises RecipeError where an encoder has nothing in
    common with the teacher's.
    """
    layers = _layers(student, teacher, config.layers)
    rows_first = {f"{name}.weight" for name, module in student.named_modules() if isinstance(module, nn.Embedding)}
    theirs, ours = teacher.state_dict(), student.state_dict()
    kept = []
    for name, tensor in ours.items():
        source = theirs.get(_renamed(name, layers))
        chosen = None if source is None else _chosen(tensor, source, config.width, name in rows_first)
        if chosen is None:
            kept.append(name)
        else:
            tensor.copy_(chosen)  # of the state: the student's own storage
    for side in ("image", "text"):
        names = [name for name in ours if name.startswith(f"{side}.")]
        if names and set(names) <= set(kept):
            raise RecipeError(
                f"{key}: no weight of the teacher's {side} encoder fits the student's; give both the same type, or "
                "leave initialise out"
            )
    return kept


def positions(num_student: int, num_teacher: int, which: Literal["first", "last", "even"]) -> list[int]:
    """Of a teacher's layers or units, as many as the student has, in order; the student has no more."""
    if which == "first" or num_student == num_teacher:
        return list(range(num_student))
    if which == "last":
        return list(range(num_teacher - num_student, num_teacher))
    if num_student == 1:
        return [0]
    return [round(number * (num_teacher - 1) / (num_student - 1)) for number in range(num_student)]


def _layers(student: Model, teacher: Model, which: Literal["first", "last", "even"]) -> dict[str, list[int]]:
    """By the name of each of the student's lists of layers: the teacher's that become its own. Where the teacher has
    fewer, its own number stays each layer's."""
    lists = {name: module for name, module in student.named_modules() if isinstance(module, nn.ModuleList)}
    modules = dict(teacher.named_modules())
    found: dict[str, list[int]] = {}
    for name, module in lists.items():  # an outer list before those within it
        theirs = modules.get(_renamed(name, found))
        if isinstance(theirs, nn.ModuleList) and len(theirs) >= len(module):
            found[name] = positions(len(module), len(theirs), which)
    return found


def _renamed(name: str, layers: dict[str, list[int]]) -> str:
    """The teacher's name of what the student calls `name`."""
    parts = name.split(".")
    renamed = list(parts)
    for place, part in enumerate(parts):
        chosen = layers.get(".".join(parts[:place]))
        if chosen is not None and part.isdigit():
            renamed[place] = str(chosen[int(part)])
    return ".".join(renamed)


def _chosen(tensor: Tensor, source: Tensor, width: Literal["first", "even"], rows_first: bool) -> Tensor | None:
    """The part of the teacher's tensor that has the shape of the student's; None where it has none.

    Widths may shrink: of a matrix or kernel both, of a vector its own, of learned tokens the last. Sides of a kernel
    and numbers of tokens or places may not, but for rows of an embedding.
    """
    if tensor.dim() != source.dim():
        return None
    free = {0: (), 3: (2,)}.get(tensor.dim(), (0, 1))
    for dimension, (ours, theirs) in enumerate(zip(tensor.shape, source.shape, strict=True)):
        if ours == theirs:
            continue
        if ours > theirs or dimension not in free:
            return None
        which = "first" if rows_first and dimension == 0 else width
        source = source.index_select(dimension, torch.tensor(positions(ours, theirs, which)))
    return source
