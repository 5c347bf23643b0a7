"""A student starts with exactly the teacher weights that the recipe asks for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmflow.core.errors import RecipeError
from mmflow.learning.distillation import InitialiseConfig
from mmflow.learning.student import initialise, positions
from mmflow.models.config import ModelConfig
from mmflow.models.model import Model, build
from tests.learning.teaching import FUSED, VOCABULARY, attending
from tests.tiny import SMALLEST_MODEL

LAYERS = {"first": [0, 1], "last": [2, 3], "even": [0, 3]}


def model(seed: int, fields: dict[str, Any]) -> Model:
    return build("model", ModelConfig.model_validate(fields), VOCABULARY, seed=seed).eval()


def begin(student: Model, teacher: Model, **config: str) -> list[str]:
    return initialise("distill.initialise", student, teacher, InitialiseConfig.model_validate(config))


@pytest.mark.parametrize("which", LAYERS)
def test_layers_are_the_teacher_s(which: str) -> None:
    student, teacher = model(0, attending(layers=2)), model(1, attending(layers=4))
    assert begin(student, teacher, layers=which) == []
    theirs = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        for own_layer, teacher_layer in zip(("0", "1"), LAYERS[which], strict=True):
            for kind in ("layer", "layers"):
                name = name.replace(f"{kind}.{own_layer}.", f"{kind}.#{teacher_layer}.")
        assert torch.equal(tensor, theirs[name.replace("#", "")]), name


def test_a_student_of_the_teacher_s_size_has_its_outputs() -> None:
    student, teacher = model(0, attending(**FUSED)), model(1, attending(**FUSED))
    pixels, ids = torch.randn(3, 3, 16, 16), torch.randint(1, VOCABULARY, (3, 5))
    with torch.inference_mode():
        before = student(pixels, ids, torch.ones_like(ids))
        assert begin(student, teacher) == []
        after, expected = student(pixels, ids, torch.ones_like(ids)), teacher(pixels, ids, torch.ones_like(ids))
    assert not torch.equal(before["image_embedding"], expected["image_embedding"])
    assert all(torch.equal(after[name], expected[name]) for name in expected)


@pytest.mark.parametrize("width", ["first", "even"])
def test_units_are_the_teacher_s(width: str) -> None:
    student, teacher = model(0, attending(width=8)), model(1, attending(width=16, attention_heads=4))
    assert begin(student, teacher, width=width) == []
    ours, theirs = student.state_dict(), teacher.state_dict()
    units = positions(8, 16, width)  # type: ignore[arg-type]
    inner = positions(16, 32, width)  # type: ignore[arg-type]
    name = next(key for key in ours if "layer.1." in key and key.endswith("intermediate.dense.weight"))
    assert torch.equal(ours[name], theirs[name][inner][:, units])
    words = "text.backbone.embeddings.word_embeddings.weight"
    assert torch.equal(ours[words], theirs[words][:, units])
    patches = next(key for key in ours if key.endswith("patch_embeddings.projection.weight"))
    assert torch.equal(ours[patches], theirs[patches][units])
    assert torch.equal(ours["image_projection.weight"], theirs["image_projection.weight"][:, units])
    positions_of_text = "text.backbone.embeddings.position_embeddings.weight"
    assert torch.equal(ours[positions_of_text], theirs[positions_of_text][:, units])


def test_a_shorter_student_takes_the_first_positions() -> None:
    fields = attending()
    fields["text"]["options"]["max_position_embeddings"] = 10
    student, teacher = model(0, fields), model(1, attending())
    begin(student, teacher)
    name = "text.backbone.embeddings.position_embeddings.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name][:10])


def test_weights_that_do_not_fit_keep_their_initial_values() -> None:
    fields = attending(image_pixels=24)  # other numbers of patches: its positions are not the teacher's
    student, teacher, fresh = model(0, fields), model(1, attending()), model(0, fields)
    kept = begin(student, teacher)
    assert kept == ["image.backbone.embeddings.position_embeddings"]
    assert torch.equal(student.state_dict()[kept[0]], fresh.state_dict()[kept[0]])


def test_convolutional_stages_shrink_and_their_statistics_with_them() -> None:
    def convolutional(widths: list[int]) -> dict[str, Any]:
        options = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": [1, 1], "layer_type": "basic"}
        return {**SMALLEST_MODEL, "image": {**SMALLEST_MODEL["image"], "options": options}}

    student, teacher = model(0, convolutional([4, 8])), model(1, convolutional([8, 16]))
    for module in teacher.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
    assert begin(student, teacher) == []
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name in (key for key in ours if key.endswith("running_mean")):
        assert torch.equal(ours[name], theirs[name][: len(ours[name])]), name


def test_another_kind_of_encoder_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"distill\.initialise: no weight of the teacher's image encoder fits"):
        begin(model(0, {**attending(), "image": SMALLEST_MODEL["image"]}), model(1, attending()))


def test_evenly_spaced_reaches_from_first_to_last() -> None:
    assert positions(3, 12, "even") == [0, 6, 11]
    assert positions(4, 4, "last") == [0, 1, 2, 3]
    for num_teacher in range(1, 40):
        for num_student in range(1, num_teacher + 1):
            places = positions(num_student, num_teacher, "even")
            assert sorted(set(places)) == places
            assert len(places) == num_student
