"""A package gives back the model that went in, byte for byte, or says which file is not what it was."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
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
    """With pixel statistics of its own."""
    return tiny_config.model_copy(update={"pixel_mean": MEAN, "pixel_std": STD})


@pytest.fixture(scope="module")
def model(config: ModelConfig, tiny_tokenizer: Tokenizer) -> Model:
    """With running statistics that are not those of a fresh one."""
    model = build("model", config, tiny_tokenizer.get_vocab_size(), seed=5).train()
    for _ in range(3):
        model.encode_image(torch.randn(8, 3, 16, 16) * 3 + 1)
    return model.eval()


def write(
    uri: Path,
    model: Model,
    config: ModelConfig,
    tokenizer: Tokenizer,
    classes: tuple[str, ...] = (),
    **lineage: Any,
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
        expected, found = model(pixels, tokens, mask), loaded.model(pixels, tokens, mask)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not loaded.model.training
    assert loaded.config == config
    assert (loaded.config.pixel_mean, loaded.config.pixel_std) == (MEAN, STD)
    assert loaded.tokenizer.encode("red apple tree").ids == tiny_tokenizer.encode("red apple tree").ids


def test_card_says_what_is_in_the_package(package: Package, model: Model) -> None:
    read = read_package(package.uri)
    assert sorted(read.card["files"]) == sorted(FILES)
    assert sorted(path.name for path in Path(package.uri).iterdir()) == sorted((*FILES, CARD))
    assert read.parameters == parameter_count(model)
    assert read.card["bytes"] == sum((Path(package.uri) / name).stat().st_size for name in FILES)
    assert read.card["lineage"] == {"stage": "pretrain"}
    assert read.digest == package.digest


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_a_flipped_byte_is_refused_naming_the_file(copy: Path, name: str, place: float) -> None:
    data = bytearray((copy / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CorruptArtifactError, match=f"copy/{name}: changed since it was committed"):
        load_package(read_package(str(copy)))


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_gone_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(MissingArtifactError, match=name):
        load_package(read_package(str(copy)))


@pytest.mark.parametrize("field", ["files", "digest"])
def test_a_card_whose_digest_is_not_that_of_its_files_is_refused(copy: Path, field: str) -> None:
    card = json.loads((copy / CARD).read_text())
    if field == "files":
        card["files"]["model.safetensors"] = "0" * 64
    else:
        card["digest"] = "0" * 64
    (copy / CARD).write_text(json.dumps(card))
    with pytest.raises(CorruptArtifactError, match=r"copy/mmflow\.json: altered"):
        read_package(str(copy))


def test_a_torn_card_is_refused(copy: Path) -> None:
    (copy / CARD).write_bytes((copy / CARD).read_bytes()[:-20])
    with pytest.raises(CorruptArtifactError, match=r"mmflow\.json: not valid JSON"):
        read_package(str(copy))


def test_no_card_is_no_package(copy: Path) -> None:
    (copy / CARD).unlink()
    with pytest.raises(MissingArtifactError, match=r"copy: no mmflow\.json"):
        read_package(str(copy))


def test_digest_is_of_the_files_alone(
    package: Package, model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    elsewhere = write(tmp_path / "elsewhere", model, config, tiny_tokenizer, stage="distill", recipe="other")
    assert elsewhere.digest == package.digest
    other = build("model", config, tiny_tokenizer.get_vocab_size(), seed=6)
    assert write(tmp_path / "other", other, config, tiny_tokenizer).digest != package.digest


def test_card_is_published_after_every_file(
    model: Model,
    config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def watched(uri: str, value: Any) -> None:
        seen[Path(uri).name] = sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr("mmflow.models.package.write_json", watched)
    write(tmp_path, model, config, tiny_tokenizer)
    assert seen == {CARD: sorted(FILES)}


def test_preprocessor_is_one_that_transformers_reads(package: Package) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(package.uri)
    assert dict(processor.crop_size) == {"height": 16, "width": 16}
    assert tuple(processor.image_mean) == MEAN


def test_classes_come_back_in_the_order_of_their_logits(
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


def test_a_package_from_before_models_were_composed_loads(
    model: Model, config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Its config.json has the dual encoder's keys alone, and its scale is at the top."""
    known = ("image", "text", "embedding_width", "image_pixels", "max_tokens", "vocabulary_size", "temperature")
    fields = {name: value for name, value in config.model_dump(mode="json").items() if name in known}
    for side in ("image", "text"):
        fields[side] = {name: fields[side][name] for name in ("type", "options", "pooling")}
    state = dict(model.state_dict())
    state["logit_scale"] = state.pop("scale.logit_scale")
    write(tmp_path, model, config, tiny_tokenizer)
    files = json.loads((tmp_path / CARD).read_text())["files"]
    contents = {name: (tmp_path / name).read_bytes() for name in files}
    contents["config.json"] = json.dumps({"model_type": "mmflow_dual_encoder", **fields}).encode()
    contents["model.safetensors"] = save(state)
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    (tmp_path / CARD).write_text(json.dumps({"files": hashes, "digest": content_hash(hashes)}))
    loaded = load_package(read_package(str(tmp_path)))
    assert loaded.config.pixel_mean == (0.5, 0.5, 0.5)
    tokens = torch.ones(2, 4, dtype=torch.int64)
    found, expected = (each(torch.ones(2, 3, 16, 16), tokens, tokens) for each in (loaded.model, model))
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_a_model_that_began_from_checkpoints_loads_where_they_are_not(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    size = tiny_tokenizer.get_vocab_size()
    text = {**config.text.options, "layer_norm_eps": 1e-3, "hidden_act": "relu"}  # which a fresh one would not have
    BertModel(BertConfig(vocab_size=size, **text)).save_pretrained(tmp_path / "bert")
    begun = ModelConfig.model_validate(
        config.model_dump()
        | {
            "text": {"checkpoint": str(tmp_path / "bert"), "positions": {"keep": 2, "stretch": 3}},
            "vocabulary_size": None,
        }
    )
    model = build("model", begun, size, seed=1).eval()
    write(tmp_path / "package", model, portable(begun, model), tiny_tokenizer)
    shutil.rmtree(tmp_path / "bert")
    loaded = load_package(read_package(str(tmp_path / "package")))
    assert loaded.config.text.checkpoint is None
    tokens = torch.randint(5, size, (2, 40))
    mask = torch.ones_like(tokens)
    found, expected = (each.encode_text(tokens, mask).sequence_BTW for each in (loaded.model, model))
    assert torch.equal(found, expected)


def test_a_clip_s_mean_from_before_it_had_no_layers_loads(
    config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    clips = ModelConfig.model_validate({**config.model_dump(), "video": {"kind": "mean", "max_frames": 3}})
    model = build("model", clips, tiny_tokenizer.get_vocab_size(), seed=5)
    write(tmp_path, model, clips, tiny_tokenizer)
    older = json.loads((tmp_path / "config.json").read_text())
    older["video"] |= {"layers": 4, "heads": 8}
    commit(tmp_path, older)
    loaded = load_package(read_package(str(tmp_path)))
    assert loaded.config == clips


def test_settings_that_this_version_does_not_know_are_named(copy: Path) -> None:
    other = json.loads((copy / "config.json").read_text())
    commit(copy, {**other, "embedding_width": -1})
    with pytest.raises(CorruptArtifactError, match=r"copy/config\.json: embedding_width: .*; this version of mmflow"):
        load_package(read_package(str(copy)))


def commit(package: Path, config: dict[str, Any]) -> None:
    """The package with another config.json."""
    (package / "config.json").write_text(json.dumps(config))
    card = json.loads((package / CARD).read_text())
    card["files"]["config.json"] = hashlib.sha256((package / "config.json").read_bytes()).hexdigest()
    card["digest"] = content_hash(card["files"])
    (package / CARD).write_text(json.dumps(card))
