"""Dual encoders from and to transformers, and to ONNX: the same outputs and weights, or an error that says why not."""

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
from mmflow.models.exporting import export_onnx, export_transformers, random_inputs
from mmflow.models.importing import import_checkpoint
from mmflow.models.model import build
from mmflow.models.package import LoadedModel, load_package, read_package

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
PICTURES = {"image_size": 16, "patch_size": 8}
LAYOUTS = ("clip", "siglip", "vision-text-dual-encoder")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def original(layout: str, vocabulary_size: int, text_type: str = "bert", **text: int) -> Any:
    """A tiny model of transformers with weights that differ from fresh ones."""
    from transformers import CONFIG_MAPPING, AutoModel

    torch.manual_seed(4)
    words = {**SIZES, "vocab_size": vocabulary_size, "max_position_embeddings": 12, "pad_token_id": 0, **text}
    vision: dict[str, Any] = {**SIZES, **PICTURES}
    if layout == "clip":
        config = CONFIG_MAPPING["clip"](
            vision_config=vision, text_config={**words, "bos_token_id": 2, "eos_token_id": 3}, projection_dim=10
        )
    elif layout == "siglip":
        config = CONFIG_MAPPING["siglip"](vision_config=vision, text_config=words)
    else:
        towers = {"vision_config": CONFIG_MAPPING["vit"](**vision), "text_config": CONFIG_MAPPING[text_type](**words)}
        config = CONFIG_MAPPING[layout](**{name: c.to_dict() for name, c in towers.items()}, projection_dim=10)
    model = AutoModel.from_config(config)
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
def imported(request: pytest.FixtureRequest, tiny_tokenizer: Tokenizer, tmp_path_factory: Any) -> Any:
    """A layout, its model, its directory, the package made from it and the model loaded from that; all read only."""
    root = tmp_path_factory.mktemp(request.param)
    model = original(request.param, tiny_tokenizer.get_vocab_size())
    directory = save(model, tiny_tokenizer, root / "original")
    package = import_checkpoint(str(root / "package"), directory)
    return request.param, model, directory, package, load_package(read_package(package.uri))


def logits(model: Any, pixels: Tensor, token_ids: Tensor, token_mask: Tensor) -> Tensor:
    """(texts, pictures), as transformers computes them; SigLIP reads padding without a mask, as in its training."""
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


def test_an_imported_package_gives_the_logits_of_the_original(imported: Any) -> None:
    layout, model, _, package, loaded = imported
    inputs = random_inputs(loaded, rows=6)
    expected = logits(model, *inputs)
    assert expected.std() > 0.1
    torch.testing.assert_close(our_logits(loaded, *inputs), expected, atol=1e-4, rtol=1e-5)
    assert package.card["lineage"]["imported"] == layout
    assert (loaded.config.image_pixels, loaded.config.max_tokens) == (16, 12)
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (MEAN, STD)
    assert loaded.model.gives == {"embeddings"} | ({"bias"} if layout == "siglip" else set())


def test_an_import_overwrites_no_other_model(imported: Any, tmp_path: Path) -> None:
    _, _, directory, package, _ = imported
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    for target in (directory, f"{directory}/../{directory.name}"):
        with pytest.raises(MisuseError, match="this is the checkpoint; name another directory"):
            import_checkpoint(str(target), directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    for uri in (str(tmp_path), package.uri):
        with pytest.raises(MisuseError, match="already holds a model"):
            import_checkpoint(uri, directory)


def test_a_round_trip_gives_back_the_weights(imported: Any, tmp_path: Path) -> None:
    """Scalars have shape () in most layouts, and always (1,) here."""
    layout, model, directory, _, loaded = imported
    assert loaded.model.scale.logit_scale.shape == (1,)
    exported = export_transformers(loaded, tmp_path / "exported")
    assert exported.layout == layout
    assert exported.difference <= 1e-4
    weights, expected = (load_file(place / "model.safetensors") for place in (tmp_path / "exported", directory))
    assert set(weights) == set(expected)
    assert weights["logit_scale"].shape == model.logit_scale.shape == ((1,) if layout == "siglip" else ())
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], atol=1e-6, rtol=1e-6)


def test_transformers_reads_an_exported_directory(imported: Any, tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor

    loaded = imported[-1]
    export_transformers(loaded, tmp_path / "exported")
    model = AutoModel.from_pretrained(tmp_path / "exported", local_files_only=True).eval()
    inputs = random_inputs(loaded, rows=3, seed=9)
    torch.testing.assert_close(logits(model, *inputs), our_logits(loaded, *inputs), atol=1e-4, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported", local_files_only=True)
    assert tokenizer("red apple tree")["input_ids"] == loaded.tokenizer.encode("red apple tree").ids
    assert tokenizer.pad_token == "[PAD]"
    assert tuple(CLIPImageProcessor.from_pretrained(tmp_path / "exported").image_mean) == MEAN


def trained(tokenizer: Tokenizer, image_type: str = "vit", text_type: str = "bert", **changes: Any) -> LoadedModel:
    """A model of our own with these towers."""
    vision: dict[str, Any] = {**SIZES, "patch_size": 8}
    if image_type == "dinov2":
        vision["mlp_ratio"] = vision.pop("intermediate_size") // 8
    fields = {
        "image": {"type": image_type, "options": vision, "pooling": "pooler"},
        "text": {"type": text_type, "options": {**SIZES, "max_position_embeddings": 16}, "pooling": "pooler"},
        "embedding_width": 6,
        "image_pixels": 16,
        "max_tokens": 12,
    }
    config = ModelConfig.model_validate(fields | changes)
    model = build("model", config, tokenizer.get_vocab_size(), seed=2)
    for _ in range(2):  # running statistics that differ from fresh ones
        model.encode_image(torch.randn(8, 3, 16, 16) * 2 + 1)
    return LoadedModel(model.eval(), tokenizer, config)


@pytest.mark.parametrize(
    ("image", "text", "layout"),
    [
        ("vit", "bert", "vision-text-dual-encoder"),
        ("dinov2", "roberta", "vision-text-dual-encoder"),
        ("clip_vision_model", "clip_text_model", "clip"),
        ("clip_vision_model", "bert", "vision-text-dual-encoder"),
    ],
)
def test_a_model_is_exported_to_the_layout_that_holds_it(
    image: str, text: str, layout: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    assert export_transformers(trained(tiny_tokenizer, image, text), tmp_path / "exported").layout == layout


def test_a_scale_past_its_bound_is_exported_as_it_is_used(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    loaded = trained(tiny_tokenizer)
    torch.nn.init.constant_(loaded.model.scale.logit_scale, 6.0)
    export_transformers(loaded, tmp_path / "exported")
    scale = load_file(tmp_path / "exported" / "model.safetensors")["logit_scale"]
    torch.testing.assert_close(scale, torch.tensor(math.log(100)))


RESNET = {"type": "resnet", "options": {"embedding_size": 4, "hidden_sizes": [8], "depths": [1]}, "pooling": "pooler"}
MEAN_TEXT = {"type": "bert", "options": SIZES, "pooling": "mean"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": MEAN_TEXT}, r"model\.text\.pooling: mean, .* bert's pooler"),
        ({"image": RESNET}, r"model\.image: resnet gives a map"),
        ({"text": {"type": "siglip_text_model", "options": SIZES, "pooling": "pooler"}}, "cannot hold .*'siglip_text"),
        ({"bias": -10.0}, r"model\.bias: only SigLIP's layout has one"),
        ({"video": {"kind": "mean"}}, "leave out video and text.windows"),
    ],
)
def test_a_model_without_a_layout_is_refused_and_nothing_is_written(
    changes: dict[str, Any], message: str, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    loaded = trained(tiny_tokenizer, **changes)
    with pytest.raises(MisuseError, match=message):
        export_transformers(loaded, tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(MisuseError, match="exists; name a new directory"):
        export_transformers(loaded, tmp_path)


def test_the_reason_an_import_fails_is_named(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
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
    del weights["logit_scale"]
    save_file(weights, directory / "model.safetensors")
    assert "no logit_scale in its *.safetensors" in refusal(directory)
    (directory / "config.json").write_text('{"model_type": "bert"}')
    assert "config.json says 'bert'; what can be imported is clip" in refusal(directory)


def test_the_default_special_tokens_of_a_type_are_kept(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """RoBERTa pads with 1 and counts positions from 2; a fresh encoder here pads with 0."""
    sizes = {"max_position_embeddings": 14, "pad_token_id": 1}
    model = original("vision-text-dual-encoder", tiny_tokenizer.get_vocab_size(), "roberta", **sizes)
    torch.nn.init.normal_(model.text_model.embeddings.position_embeddings.weight)
    import_checkpoint(str(tmp_path / "package"), save(model, tiny_tokenizer, tmp_path / "original"))
    loaded = load_package(read_package(str(tmp_path / "package")))
    assert loaded.config.max_tokens == 12
    pixels, token_ids, token_mask = random_inputs(loaded, rows=4)
    inputs = pixels, token_ids.masked_fill(token_mask == 0, 1), token_mask
    torch.testing.assert_close(our_logits(loaded, *inputs), logits(model, *inputs), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("export", [export_transformers, export_onnx])
def test_an_export_with_other_outputs_is_refused_and_nothing_is_written(
    export: Any, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if export is export_onnx:
        pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(MmflowError, match=r"(logits|embeddings) differ by .*; nothing written"):
        export(trained(tiny_tokenizer), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"image": RESNET, "text": MEAN_TEXT},
        {
            "image": {"type": "vit", "options": {**SIZES, "patch_size": 8}, "pooling": "attention"},
            "text": {"type": "clip_text_model", "options": SIZES, "pooling": "eos"},
        },
    ],
)
def test_onnx_graphs_give_the_embeddings_of_torch(changes: Any, tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    """For any number of rows and tokens."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    loaded = trained(tiny_tokenizer, **changes)
    differences = export_onnx(loaded, tmp_path / "exported")
    assert set(differences) == {"image.onnx", "text.onnx"}
    assert all(0 <= difference <= 1e-4 for difference in differences.values())
    session = onnxruntime.InferenceSession(tmp_path / "exported" / "text.onnx")
    for rows, tokens in ((1, 3), (7, 8)):
        ids = torch.randint(5, tiny_tokenizer.get_vocab_size(), (rows, tokens))
        mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (rows, 1))).long()
        (embedding,) = session.run(None, {"token_ids": ids.numpy(), "token_mask": mask.numpy()})
        with torch.inference_mode():
            expected = loaded.model.embed_text(loaded.model.encode_text(ids, mask))
        torch.testing.assert_close(torch.from_numpy(embedding), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "exported" / "scale.json").read_text()) == {"logit_scale": pytest.approx(1 / 0.07)}


def test_onnx_needs_a_shared_space(tiny_tokenizer: Tokenizer, tmp_path: Path) -> None:
    fusion = {"kind": "gated", "width": 8}
    loaded = trained(tiny_tokenizer, embedding_width=None, fusion=fusion, heads=["matching"])
    with pytest.raises(MisuseError, match=r"model\.embedding_width: null"):
        export_onnx(loaded, tmp_path / "exported")
