"""A package loads exactly the model that was written, or names the file that changed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mmflow.core.artifacts import content_hash
from mmflow.core.errors import CorruptArtifactError, MissingArtifactError
from mmflow.models.config import ModelConfig
from mmflow.models.encoders import parameter_count
from mmflow.models.model import Model, build
from mmflow.models.package import CARD, Package, load_package, portable, read_package, write_package

FILES = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def config(tiny_config: ModelConfig) -> ModelConfig:
    """With its own pixel statistics."""
    return tiny_config.model_copy(update={"pixel_mean": MEAN, "pixel_std": STD})


@pytest.fixture(scope="module")
def model(config: ModelConfig, tiny_tokenizer: Tokenizer) -> Model:
    """With running statistics that differ from fresh ones."""
    model = build("model", config, tiny_tokenizer.get_vocab_size(), seed=5).train()
    for _ in range(3):
        model.encode_image(torch.randn(8, 3, 16, 16) * 3 + 1)
    return model.eval()


def write(
    uri: Path, model: Model, config: ModelConfig, tokenizer: Tokenizer, classes: Any = (), **lineage: Any
) -> Package:
    return write_package(
        str(uri),
        state=model.state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        parameters=parameter_count(model),
        lineage=lineage,
        classes=classes,
    )


@pytest.fixture(scope="module")
def package(
    model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Package:
    """Read only."""
    return write(tmp_path_factory.mktemp("package"), model, config, tiny_tokenizer, stage="pretrain")


@pytest.fixture
def copy(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.uri, tmp_path / "copy"))


def test_round_trip_gives_identical_embeddings(
    package: Package, model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    loaded = load_package(read_package(package.uri))
    pixels, tokens = torch.randn(6, 3, 16, 16), torch.randint(0, tiny_tokenizer.get_vocab_size(), (6, 7))
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        expected, outputs = model(pixels, tokens, mask), loaded.model(pixels, tokens, mask)
    for name in expected:
        assert torch.equal(outputs[name], expected[name]), name
    assert not loaded.model.training
    assert loaded.config == config
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (MEAN, STD)
    assert loaded.tokenizer.encode("red apple tree").ids == tiny_tokenizer.encode("red apple tree").ids


def test_the_card_describes_the_package(package: Package, model: Model) -> None:
    read = read_package(package.uri)
    assert sorted(read.card["files"]) == sorted(FILES)
    assert sorted(path.name for path in Path(package.uri).iterdir()) == sorted((*FILES, CARD))
    assert read.parameters == parameter_count(model)
    assert read.card["bytes"] == sum((Path(package.uri) / name).stat().st_size for name in FILES)
    assert read.card["lineage"] == {"stage": "pretrain"}
    assert read.digest == package.digest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_file_with_a_flipped_byte_is_named(copy: Path, name: str, place: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=f"copy/{name}: changed since it was committed"):
        load_package(read_package(str(copy)))


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(MissingArtifactError, match=name):
        load_package(read_package(str(copy)))


def test_a_changed_torn_or_missing_card_is_refused(copy: Path) -> None:
    text = (copy / CARD).read_text()
    card = json.loads(text)
    for change in ({"files": card["files"] | {"model.safetensors": "0" * 64}}, {"digest": "0" * 64}):
        (copy / CARD).write_text(json.dumps(card | change))
        with pytest.raises(CorruptArtifactError, match=r"copy/mmflow\.json: changed since it was committed"):
            read_package(str(copy))
    (copy / CARD).write_text(text[:-20])
    with pytest.raises(CorruptArtifactError, match=r"mmflow\.json: not valid JSON"):
        read_package(str(copy))
    (copy / CARD).unlink()
    with pytest.raises(MissingArtifactError, match=r"copy: no mmflow\.json"):
        read_package(str(copy))


def test_the_digest_only_depends_on_the_files(
    package: Package, model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    elsewhere = write(tmp_path / "elsewhere", model, config, tiny_tokenizer, stage="distill", recipe="other")
    assert elsewhere.digest == package.digest
    other = build("model", config, tiny_tokenizer.get_vocab_size(), seed=6)
    assert write(tmp_path / "other", other, config, tiny_tokenizer).digest != package.digest


def test_the_card_is_written_after_every_file(
    model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    existing = {}

    def write_json(uri: str, value: Any) -> None:
        existing[Path(uri).name] = sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr("mmflow.models.package.write_json", write_json)
    write(tmp_path, model, config, tiny_tokenizer)
    assert existing == {CARD: sorted(FILES)}


def test_transformers_reads_the_preprocessor(package: Package) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(package.uri)
    assert dict(processor.crop_size) == {"height": 16, "width": 16}
    assert tuple(processor.image_mean) == MEAN


def test_classes_are_loaded_in_the_order_of_their_logits(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    classified = ModelConfig.model_validate(config.model_dump() | {"heads": ["classes"]})
    classes = ("pear", "apple", "苹果")
    model = build("model", classified, tiny_tokenizer.get_vocab_size(), seed=1, num_classes=3).eval()
    write(tmp_path, model, classified, tiny_tokenizer, classes=classes)
    loaded = load_package(read_package(str(tmp_path)))
    assert loaded.classes == classes
    image = loaded.model.encode_image(torch.ones(1, 3, 16, 16))
    expected = model.class_logits(model.fuse(model.encode_image(torch.ones(1, 3, 16, 16)), None))
    assert torch.equal(loaded.model.class_logits(loaded.model.fuse(image, None)), expected)


def test_a_model_from_checkpoints_loads_without_them(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    size = tiny_tokenizer.get_vocab_size()
    text = {**config.text.options, "layer_norm_eps": 1e-3, "hidden_act": "relu"}  # not the defaults
    BertModel(BertConfig(vocab_size=size, **text)).save_pretrained(tmp_path / "bert")
    text = {"checkpoint": str(tmp_path / "bert"), "positions": {"keep": 2, "stretch": 3}}
    config = ModelConfig.model_validate(config.model_dump() | {"text": text, "vocabulary_size": None})
    model = build("model", config, size, seed=1).eval()
    write(tmp_path / "package", model, portable(config, model), tiny_tokenizer)
    shutil.rmtree(tmp_path / "bert")
    loaded = load_package(read_package(str(tmp_path / "package")))
    assert loaded.config.text.checkpoint is None
    tokens = torch.randint(5, size, (2, 40))
    mask = torch.ones_like(tokens)
    sequences = [either.encode_text(tokens, mask).sequence_BTW for either in (loaded.model, model)]
    assert torch.equal(*sequences)


def test_invalid_settings_are_named(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "embedding_width": -1}))
    card = json.loads((copy / CARD).read_text())
    card["files"]["config.json"] = hashlib.sha256((copy / "config.json").read_bytes()).hexdigest()
    (copy / CARD).write_text(json.dumps(card | {"digest": content_hash(card["files"])}))
    with pytest.raises(CorruptArtifactError, match=r"copy/config\.json: embedding_width: .*; this version of mmflow"):
        load_package(read_package(str(copy)))
