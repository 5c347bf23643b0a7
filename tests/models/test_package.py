"""A package gives back the model that went in, byte for byte, or says which file is not what it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mmflow.errors import CorruptArtifactError, MissingArtifactError
from mmflow.models.config import ModelConfig
from mmflow.models.dual import DualEncoder, build_dual_encoder
from mmflow.models.encoders import parameter_count
from mmflow.models.package import CARD, Package, load_package, read_package, write_package

FILES = ("model.safetensors", "config.json", "tokenizer.json", "preprocessor_config.json")
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


@pytest.fixture(scope="module")
def model(tiny_config: ModelConfig, tiny_tokenizer: Tokenizer) -> DualEncoder:
    """With running statistics that are not those of a fresh one."""
    model = build_dual_encoder("model", tiny_config, tiny_tokenizer.get_vocab_size(), seed=5).train()
    for _ in range(3):
        model.embed_images(torch.randn(8, 3, 16, 16) * 3 + 1)
    return model.eval()


def write(uri: Path, model: DualEncoder, config: ModelConfig, tokenizer: Tokenizer, **lineage: Any) -> Package:
    return write_package(
        str(uri),
        state=model.state_dict(),
        config=config,
        tokenizer_json=tokenizer.to_str(),
        mean=MEAN,
        std=STD,
        parameters=parameter_count(model),
        lineage=lineage,
    )


@pytest.fixture(scope="module")
def package(
    model: DualEncoder, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Package:
    """Read only."""
    return write(tmp_path_factory.mktemp("package"), model, tiny_config, tiny_tokenizer, stage="pretrain")


@pytest.fixture
def copy(package: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package.uri, tmp_path / "copy"))


def test_round_trip_gives_identical_embeddings(
    package: Package, model: DualEncoder, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer
) -> None:
    loaded = load_package(read_package(package.uri))
    pixels, tokens = torch.randn(6, 3, 16, 16), torch.randint(0, tiny_tokenizer.get_vocab_size(), (6, 7))
    mask = torch.ones_like(tokens)
    with torch.inference_mode():
        expected, found = model(pixels, tokens, mask), loaded.model(pixels, tokens, mask)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert not loaded.model.training
    assert loaded.config == tiny_config
    assert (loaded.mean, loaded.std) == (MEAN, STD)
    assert loaded.tokenizer.encode("red apple tree").ids == tiny_tokenizer.encode("red apple tree").ids


def test_card_says_what_is_in_the_package(package: Package, model: DualEncoder) -> None:
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
    with pytest.raises(CorruptArtifactError, match=f"copy/{name}: altered since it was committed"):
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
    package: Package, model: DualEncoder, tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    elsewhere = write(tmp_path / "elsewhere", model, tiny_config, tiny_tokenizer, stage="distill", recipe="other")
    assert elsewhere.digest == package.digest
    other = build_dual_encoder("model", tiny_config, tiny_tokenizer.get_vocab_size(), seed=6)
    assert write(tmp_path / "other", other, tiny_config, tiny_tokenizer).digest != package.digest


def test_card_is_published_after_every_file(
    model: DualEncoder,
    tiny_config: ModelConfig,
    tiny_tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = {}

    def watched(uri: str, value: Any) -> None:
        seen[Path(uri).name] = sorted(path.name for path in tmp_path.iterdir())

    monkeypatch.setattr("mmflow.models.package.write_json", watched)
    write(tmp_path, model, tiny_config, tiny_tokenizer)
    assert seen == {CARD: sorted(FILES)}


def test_preprocessor_is_one_that_transformers_reads(package: Package) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(package.uri)
    assert dict(processor.crop_size) == {"height": 16, "width": 16}
    assert tuple(processor.image_mean) == MEAN
