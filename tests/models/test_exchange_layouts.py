"""Dual encoders from and to transformers' layouts: the same logits, the same weights, or a line that says why not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from mmflow.core.errors import MisuseError, MmflowError
from mmflow.models import exporting
from mmflow.models.config import ModelConfig
from mmflow.models.exporting import export_transformers, random_inputs
from mmflow.models.importing import import_checkpoint
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, load_package, read_package

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURES = {"image_size": 16, "patch_size": 8}
LAYOUTS = ("clip", "siglip", "vision-text-dual-encoder")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def original(layout: str, vocabulary_size: int) -> Any:
    """A tiny model of transformers with weights that are not those of a fresh one."""
    from transformers import (
        BertConfig,
        CLIPConfig,
        CLIPModel,
        SiglipConfig,
        SiglipModel,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
        ViTConfig,
    )

    torch.manual_seed(4)
    words = {**SIZES, "vocab_size": vocabulary_size, "max_position_embeddings": 12, "pad_token_id": 0}
    if layout == "clip":
        text = {**words, "bos_token_id": 2, "eos_token_id": 3}
        model: Any = CLIPModel(CLIPConfig(vision_config={**SIZES, **PICTURES}, text_config=text, projection_dim=10))
    elif layout == "siglip":
        model = SiglipModel(SiglipConfig(vision_config={**SIZES, **PICTURES}, text_config=words))
    else:
        towers = {"vision_config": ViTConfig(**SIZES, **PICTURES), "text_config": BertConfig(**words)}
        config = VisionTextDualEncoderConfig(
            **{name: tower.to_dict() for name, tower in towers.items()}, projection_dim=10
        )
        model = VisionTextDualEncoderModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
        model.logit_scale.fill_(math.log(117) if layout == "siglip" else math.log(60))
        if layout == "siglip":
            model.logit_bias.fill_(-12.0)
    return model.eval()


def save(model: Any, tokenizer: Tokenizer, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    processor = {"size": {"shortest_edge": 16}, "image_mean": MEAN, "image_std": STD}
    (directory / "preprocessor_config.json").write_text(json.dumps(processor))
    return directory


@pytest.fixture(scope="module", params=LAYOUTS)
def given(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A layout, its model, and its directory, which is read only."""
    model = original(request.param, tiny_tokenizer.get_vocab_size())
    return request.param, model, save(model, tiny_tokenizer, tmp_path_factory.mktemp(request.param) / "original")


def logits(model: Any, pixels: Tensor, token_ids: Tensor, token_mask: Tensor) -> Tensor:
    """(texts, pictures), as transformers has them; SigLIP is given what it was trained on, padding without a mask."""
    inputs = {"input_ids": token_ids, "attention_mask": token_mask, "pixel_values": pixels}
    if model.config.model_type == "siglip":
        padded = torch.zeros(len(token_ids), 12, dtype=torch.int64)
        padded[:, : token_ids.shape[1]] = token_ids * token_mask
        inputs |= {"input_ids": padded, "attention_mask": None}
    with torch.inference_mode():
        return model(**inputs).logits_per_text


def our_logits(loaded: LoadedModel, *inputs: Tensor) -> Tensor:
    with torch.inference_mode():
        outputs = loaded.model(*inputs)
    cosines = outputs["text_embedding"] @ outputs["image_embedding"].T
    return outputs["logit_scale"] * cosines + outputs.get("logit_bias", 0.0)


def test_an_imported_package_gives_the_logits_of_the_original(given: Any, tmp_path: Path) -> None:
    layout, model, directory = given
    package = import_checkpoint(str(tmp_path), directory)
    loaded = load_package(read_package(str(tmp_path)))
    inputs = random_inputs(loaded, rows=6)
    expected = logits(model, *inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(loaded, *inputs), expected, atol=1e-4, rtol=1e-5)
    assert package.card["lineage"]["imported"] == layout
    assert (loaded.config.image_pixels, loaded.config.max_tokens) == (16, 12)
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (MEAN, STD)
    assert loaded.model.gives == {"embeddings"} | ({"bias"} if layout == "siglip" else set())


def test_what_is_there_is_not_imported_over(given: Any, tmp_path: Path) -> None:
    _, _, directory = given
    before = {path.name: path.read_bytes() for path in Path(directory).iterdir()}
    for target in (directory, f"{directory}/../{Path(directory).name}"):
        with pytest.raises(MisuseError, match="that is the checkpoint; name another directory"):
            import_checkpoint(str(target), directory)
    assert {path.name: path.read_bytes() for path in Path(directory).iterdir()} == before
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(MisuseError, match="a model is there already"):
        import_checkpoint(str(tmp_path), directory)


def test_scalars_without_a_dimension_have_one_here_and_lose_it_there(given: Any, tmp_path: Path) -> None:
    layout, model, directory = given
    shape = (1,) if layout == "siglip" else ()
    assert model.logit_scale.shape == shape
    import_checkpoint(str(tmp_path / "package"), directory)
    loaded = load_package(read_package(str(tmp_path / "package")))
    assert loaded.model.scale.logit_scale.shape == (1,)
    torch.testing.assert_close(loaded.model.scale.logit_scale.reshape(shape), model.logit_scale)
    export_transformers(loaded, tmp_path / "exported")
    assert load_file(tmp_path / "exported" / "model.safetensors")["logit_scale"].shape == shape


def test_a_round_trip_gives_back_the_weights(given: Any, tmp_path: Path) -> None:
    layout, _, directory = given
    import_checkpoint(str(tmp_path / "package"), directory)
    loaded = load_package(read_package(str(tmp_path / "package")))
    exported = export_transformers(loaded, tmp_path / "exported")
    assert exported.layout == layout
    assert exported.difference <= 1e-4
    found, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "exported", directory))
    assert set(found) == set(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-6)


def test_an_exported_directory_is_one_that_transformers_reads(given: Any, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor

    _, _, directory = given
    import_checkpoint(str(tmp_path / "package"), directory)
    loaded = load_package(read_package(str(tmp_path / "package")))
    export_transformers(loaded, tmp_path / "exported")
    model = AutoModel.from_pretrained(tmp_path / "exported", local_files_only=True).eval()
    inputs = random_inputs(loaded, rows=3, seed=9)
    torch.testing.assert_close(logits(model, *inputs), our_logits(loaded, *inputs), atol=1e-4, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported", local_files_only=True)
    assert tokenizer("red apple tree")["input_ids"] == loaded.tokenizer.encode("red apple tree").ids
    assert tokenizer.pad_token == "[PAD]"
    assert tuple(CLIPImageProcessor.from_pretrained(tmp_path / "exported").image_mean) == MEAN


def trained(tokenizer: Tokenizer, **changes: Any) -> LoadedModel:
    """A model of our own with towers of patches and words."""
    fields = {
        "image": {"type": "vit", "options": {**SIZES, "patch_size": 8}, "pooling": "pooler"},
        "text": {"type": "bert", "options": {**SIZES, "max_position_embeddings": 16}, "pooling": "pooler"},
        "embedding_width": 6,
        "image_pixels": 16,
        "max_tokens": 12,
    }
    config = ModelConfig.model_validate(fields | changes)
    model = build("model", config, tokenizer.get_vocab_size(), seed=2).eval()
    return LoadedModel(model, tokenizer, config)


@pytest.mark.parametrize(
    ("image", "text", "layout"),
    [
        ("vit", "bert", "vision-text-dual-encoder"),
        ("dinov2", "roberta", "vision-text-dual-encoder"),
        ("clip_vision_model", "clip_text_model", "clip"),
        ("clip_vision_model", "bert", "vision-text-dual-encoder"),
    ],
)
def test_a_model_of_our_own_is_exported_to_the_layout_that_holds_it(
    image: str, text: str, layout: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    options = {**SIZES, "patch_size": 8}
    if image == "dinov2":
        options = {**{name: value for name, value in options.items() if name != "intermediate_size"}, "mlp_ratio": 2}
    loaded = trained(
        tiny_tokenizer,
        image={"type": image, "options": options, "pooling": "pooler"},
        text={"type": text, "options": {**SIZES, "max_position_embeddings": 16}, "pooling": "pooler"},
    )
    assert export_transformers(loaded, tmp_path / "exported").layout == layout


def test_a_scale_past_its_bound_is_exported_as_it_is_used(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = trained(tiny_tokenizer)
    torch.nn.init.constant_(loaded.model.scale.logit_scale, 6.0)
    export_transformers(loaded, tmp_path / "exported")
    found = load_file(tmp_path / "exported" / "model.safetensors")["logit_scale"]
    torch.testing.assert_close(found, torch.tensor(math.log(100)))


RESNET = {"type": "resnet", "options": {"embedding_size": 4, "hidden_sizes": [8], "depths": [1]}, "pooling": "pooler"}
MEAN_TEXT = {"type": "bert", "options": SIZES, "pooling": "mean"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"text": MEAN_TEXT}, r"model\.text\.pooling: mean, and transformers' dual encoders read bert's pooler"),
        ({"image": RESNET}, r"model\.image: resnet gives a map"),
        (
            {"text": {"type": "siglip_text_model", "options": SIZES, "pooling": "pooler"}},
            r"model: transformers' VisionTextDualEncoder cannot hold \('vit', 'siglip_text_model'\)",
        ),
        ({"bias": -10.0}, r"model\.bias: of all layouts SigLIP's alone has one"),
        ({"video": {"kind": "mean"}}, "leave out video and text.windows"),
    ],
)
def test_what_no_layout_holds_is_named_and_nothing_is_written(
    changes: dict[str, Any], said: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with pytest.raises(MisuseError, match=said):
        export_transformers(trained(tiny_tokenizer, **changes), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_other_logits_are_refused_and_nothing_is_written(
    tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_copy", lambda theirs, ours: None)
    with pytest.raises(MmflowError, match=r"logits differ by .*, more than 0\.0001; nothing written"):
        export_transformers(trained(tiny_tokenizer), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_exists_is_not_written_over(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match="exists; name a new directory"):
        export_transformers(trained(tiny_tokenizer), tmp_path)


def test_what_cannot_be_imported_is_named(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    def refusal(directory: Path) -> str:
        with pytest.raises(MisuseError) as caught:
            import_checkpoint(str(tmp_path / "package"), directory)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "package").exists()
        return str(caught.value)

    assert "config.json: cannot be read" in refusal(tmp_path / "nowhere")
    directory = save(original("clip", tiny_tokenizer.get_vocab_size()), tiny_tokenizer, tmp_path / "clip")
    (directory / "preprocessor_config.json").write_text("{}")
    assert "preprocessor_config.json: no image_mean" in refusal(directory)
    weights = load_file(directory / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if name != "logit_scale"}, directory / "model.safetensors"
    )
    assert "no logit_scale in its *.safetensors" in refusal(directory)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    assert "its config.json says 'bert'; what can be imported is clip" in refusal(directory)


def test_special_tokens_that_are_the_usual_ones_of_their_kind_stay(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """RoBERTa pads with 1 and counts positions from 2, where a fresh encoder here pads with 0."""
    from transformers import RobertaConfig, VisionTextDualEncoderConfig, VisionTextDualEncoderModel, ViTConfig

    words = RobertaConfig(**SIZES, vocab_size=tiny_tokenizer.get_vocab_size(), max_position_embeddings=14)
    config = VisionTextDualEncoderConfig(
        vision_config=ViTConfig(**SIZES, **PICTURES).to_dict(), text_config=words.to_dict(), projection_dim=10
    )
    torch.manual_seed(5)
    model = VisionTextDualEncoderModel(config).eval()
    torch.nn.init.normal_(model.text_model.embeddings.position_embeddings.weight)
    import_checkpoint(str(tmp_path / "package"), save(model, tiny_tokenizer, tmp_path / "original"))
    loaded = load_package(read_package(str(tmp_path / "package")))
    assert loaded.config.max_tokens == 12
    pixels, token_ids, token_mask = random_inputs(loaded, rows=4)
    token_ids = token_ids.masked_fill(token_mask == 0, 1)
    expected = logits(model, pixels, token_ids, token_mask)
    torch.testing.assert_close(our_logits(loaded, pixels, token_ids, token_mask), expected, atol=1e-4, rtol=1e-5)
