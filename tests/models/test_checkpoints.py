"""Towers of local checkpoints: the weights that were saved, or one line that says what is wrong with the directory."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmflow.core.errors import RecipeError
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.encoders import TextTower
from mmflow.models.model import build_image_encoder, build_text_encoder
from mmflow.models.package import without_checkpoint
from mmflow.models.video import ImageTower
from tests.models.backbones import IMAGE, TEXT

PIXELS, VOCABULARY = 16, 64


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each kind the smallest, saved by transformers itself."""
    from transformers import (
        CONFIG_MAPPING,
        BertForMaskedLM,
        CLIPModel,
        RobertaModel,
        SiglipModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        ViTModel,
    )

    torch.manual_seed(3)
    words: dict[str, Any] = {"vocab_size": VOCABULARY}
    image = {
        name: CONFIG_MAPPING[name](**options, image_size=PIXELS) for name, options in IMAGE.items() if name != "resnet"
    }
    text = {name: CONFIG_MAPPING[name](**TEXT[name], **words, pad_token_id=1, eos_token_id=3) for name in TEXT}
    models = {
        "vit": ViTModel(image["vit"]),
        "bert": BertForMaskedLM(text["bert"]),
        "roberta": RobertaModel(text["roberta"]),
        "clip": CLIPModel(
            CONFIG_MAPPING["clip"](
                text_config=text["clip_text_model"].to_dict(), vision_config=image["clip_vision_model"].to_dict()
            )
        ),
        "siglip": SiglipModel(
            CONFIG_MAPPING["siglip"](
                text_config=text["siglip_text_model"].to_dict(), vision_config=image["siglip_vision_model"].to_dict()
            )
        ),
        "dual": VisionTextDualEncoderModel(
            VisionTextDualEncoderConfig.from_vision_text_configs(image["vit"], text["bert"], projection_dim=6)
        ),
    }
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loading a checkpoint must not call anybody")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def image_tower(path: Path, pixels: int = PIXELS, **settings: Any) -> ImageTower:
    config = ImageEncoderConfig(checkpoint=str(path), pooling="pooler").model_copy(update=settings)
    return build_image_encoder("m.image", config, pixels)


def text_tower(path: Path, vocabulary: int = VOCABULARY, **settings: Any) -> TextTower:
    config = TextEncoderConfig(checkpoint=str(path), pooling="pooler").model_copy(update=settings)
    return build_text_encoder("m.text", config, vocabulary, 12)


def original(path: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, local_files_only=True).eval()


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "vit"])
def test_image_tower_gives_what_the_checkpoint_gives(checkpoints: dict[str, Path], name: str) -> None:
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    whole = original(checkpoints[name])
    expected = getattr(whole, "vision_model", whole)(pixel_values=pixels).pooler_output
    torch.testing.assert_close(image_tower(checkpoints[name]).eval()(pixels).pooled_BW, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "bert", "roberta"])
def test_text_tower_gives_what_the_checkpoint_gives(checkpoints: dict[str, Path], name: str) -> None:
    ids = torch.randint(4, VOCABULARY, (2, 24 if name == "siglip" else 10))
    ids[:, -1] = 3
    whole = original(checkpoints[name])
    expected = getattr(whole, "text_model", whole)(input_ids=ids)
    pooling = "mean" if name == "bert" else "pooler"  # saved with its language head, BERT has none
    encoded = text_tower(checkpoints[name], pooling=pooling).eval()(ids)
    torch.testing.assert_close(encoded.sequence_BTW, expected.last_hidden_state)
    if pooling == "pooler":
        torch.testing.assert_close(encoded.pooled_BW, expected.pooler_output)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "vit"])
def test_settings_without_the_checkpoint_build_the_same_tower(checkpoints: dict[str, Path], name: str) -> None:
    tower = image_tower(checkpoints[name]).eval()
    config = ImageEncoderConfig(checkpoint=str(checkpoints[name]), pooling="pooler")
    alone = without_checkpoint(config, tower)
    assert alone.checkpoint is None
    assert json.loads(alone.model_dump_json()) == alone.model_dump()
    assert str(checkpoints[name]) not in alone.model_dump_json()  # a package goes to other machines
    again = build_image_encoder("m.image", alone, PIXELS).eval()
    again.load_state_dict(tower.state_dict())
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    assert torch.equal(again(pixels).pooled_BW, tower(pixels).pooled_BW)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "roberta"])
def test_text_settings_without_the_checkpoint_build_the_same_tower(checkpoints: dict[str, Path], name: str) -> None:
    config = TextEncoderConfig.model_validate(
        {
            "checkpoint": str(checkpoints[name]),
            "pooling": "mean",
            "positions": {"stretch": 3, "keep": 4},
            "windows": {"tokens": 40},
        }
    )
    tower = build_text_encoder("m.text", config, VOCABULARY, 60).eval()
    alone = without_checkpoint(config, tower)
    assert alone.positions is None
    assert str(checkpoints[name]) not in alone.model_dump_json()  # a package goes to other machines
    again = build_text_encoder("m.text", alone, VOCABULARY, 60).eval()
    again.load_state_dict(tower.state_dict())
    ids = torch.randint(4, VOCABULARY, (2, 60))
    assert torch.equal(again(ids).pooled_BW, tower(ids).pooled_BW)


def test_rows_past_the_tokenizers_vocabulary_are_dropped(checkpoints: dict[str, Path]) -> None:
    tower = text_tower(checkpoints["clip"], vocabulary=60).eval()
    assert tower.backbone.get_input_embeddings().weight.shape == (60, 8)  # type: ignore[union-attr, operator]
    ids = torch.randint(4, 60, (2, 9))
    expected = original(checkpoints["clip"]).text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tower(ids).sequence_BTW, expected)


@pytest.mark.parametrize("vocabulary", [65, 40])
def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoints: dict[str, Path], vocabulary: int) -> None:
    with pytest.raises(
        RecipeError,
        match=rf"^m.text.checkpoint: .*roberta has a vocabulary of 64, the tokenizer {vocabulary}; use",
    ):
        text_tower(checkpoints["roberta"], vocabulary=vocabulary)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_a_checkpoint_of_another_resolution_has_its_positions_resampled(
    checkpoints: dict[str, Path], pooling: str
) -> None:
    """As DINOv2 does in its forward; nothing else changes."""
    tower = image_tower(checkpoints["vit"], pixels=32, pooling=pooling).eval()
    pixels = torch.randn(2, 3, 32, 32)
    whole = original(checkpoints["vit"])
    expected = whole(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(tower(pixels).sequence_BTW, expected)


def test_options_are_laid_over_the_checkpoints_own(checkpoints: dict[str, Path]) -> None:
    tower = image_tower(checkpoints["clip"], options={"attention_dropout": 0.25})
    assert tower.backbone.config.attention_dropout == 0.25  # type: ignore[union-attr]


@pytest.fixture
def broken(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["vit"], tmp_path / "broken"))


def test_a_pickle_is_not_read(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(
        RecipeError, match=r"^m.image.checkpoint: .*broken holds pytorch_model.bin alone, a pickle, which"
    ):
        image_tower(broken)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.json", None, "has no config.json; give a directory that save_pretrained wrote"),
        ("config.json", "{", "/config.json names no model_type"),
        ("config.json", "[]", "/config.json names no model_type"),
        ("config.json", '{"model_type": "vitt"}', "is a 'vitt', which transformers itself does not know; did you mean"),
        ("config.json", '{"model_type": "vit", "hidden_size": "wide"}', "/config.json is not one of vit"),
        ("model.safetensors", None, "has no model.safetensors; save the model's weights there"),
        ("model.safetensors", "torn", "does not load"),
    ],
)
def test_a_broken_directory_is_named(broken: Path, name: str, content: str | None, said: str) -> None:
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_text(content)
    with pytest.raises(RecipeError) as caught:
        image_tower(broken)
    assert str(caught.value).startswith(f"m.image.checkpoint: {broken}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_not_run(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    image_tower(broken)
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_absent_are_not_made_up(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if "layernorm" in name)
    del weights[gone]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"^m.image.checkpoint: .* holds no .*layernorm.*, nor 0 others of vit; save"):
        image_tower(broken)


def test_a_pooler_is_only_asked_for_where_it_is_read(checkpoints: dict[str, Path]) -> None:
    text_tower(checkpoints["bert"], pooling="mean")
    with pytest.raises(RecipeError, match=r"holds no pooler\.dense\."):
        text_tower(checkpoints["bert"], pooling="pooler")


def test_a_side_that_a_checkpoint_lacks_is_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"^m.text.checkpoint: vit is no encoder of text; use another"):
        text_tower(checkpoints["vit"])


def test_weights_of_another_shape_are_refused(checkpoints: dict[str, Path]) -> None:
    with pytest.raises(RecipeError, match=r"^m.image.checkpoint: .*vit does not load \("):
        image_tower(checkpoints["vit"], options={"intermediate_size": 24})


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("/nowhere/at/all", "is no directory of this machine; give one that save_pretrained wrote"),
        ("package:tests/nowhere", "is no directory of this machine; give one that save_pretrained wrote"),
        ("package:no_such_package/model", "names a package that is not installed here; install 'no_such_package'"),
        ("package:../vit", "names a package that is not installed here; install '..'"),
    ],
)
def test_a_directory_that_is_not_there_is_named(checkpoint: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        image_tower(Path("unused"), checkpoint=checkpoint)
    assert str(caught.value) == f"m.image.checkpoint: {checkpoint} {said}"


def test_a_package_is_found_and_not_imported(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_weights"
    shutil.copytree(checkpoints["vit"], package / "model")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tower = image_tower(Path("unused"), checkpoint="package:carries_weights/model")
    expected = image_tower(checkpoints["vit"]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())
