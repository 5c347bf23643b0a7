"""The two towers as ONNX graphs give torch's embeddings, for any number of rows and tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from mmflow.core.errors import MisuseError, MmflowError
from mmflow.models import exporting
from mmflow.models.config import ModelConfig
from mmflow.models.exporting import IMAGE, SCALE, TEXT, export_onnx
from mmflow.models.model import build
from mmflow.models.package import LoadedModel

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def loaded_model(config: ModelConfig, tokenizer: Tokenizer, **changes: Any) -> LoadedModel:
    config = ModelConfig.model_validate(config.model_dump() | changes)
    model = build("model", config, tokenizer.get_vocab_size(), seed=2)
    for _ in range(2):  # running statistics that are not those of a fresh one
        model.encode_image(torch.randn(8, 3, 16, 16) * 2 + 1)
    return LoadedModel(model.eval(), tokenizer, config)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "image": {"type": "vit", "options": {**SIZES, "patch_size": 8}, "pooling": "attention"},
            "text": {"type": "clip_text_model", "options": SIZES, "pooling": "eos"},
        },
    ],
)
def test_graphs_give_torch_s_embeddings(
    changes: dict[str, Any], tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    loaded = loaded_model(tiny_config, tiny_tokenizer, **changes)
    differences = export_onnx(loaded, tmp_path / "exported")
    assert set(differences) == {IMAGE, TEXT}
    assert all(0 <= difference <= 1e-4 for difference in differences.values())
    session = onnxruntime.InferenceSession(tmp_path / "exported" / TEXT)
    for rows, tokens in ((1, 3), (7, 8)):
        ids = torch.randint(5, tiny_tokenizer.get_vocab_size(), (rows, tokens))
        mask = (torch.arange(tokens) < torch.randint(2, tokens + 1, (rows, 1))).long()
        (found,) = session.run(None, {"token_ids": ids.numpy(), "token_mask": mask.numpy()})
        with torch.inference_mode():
            expected = loaded.model.embed_text(loaded.model.encode_text(ids, mask))
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)
    assert json.loads((tmp_path / "exported" / SCALE).read_text()) == {"logit_scale": pytest.approx(1 / 0.07)}


def test_other_embeddings_are_refused_and_nothing_is_written(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    with pytest.raises(MmflowError, match=r"image\.onnx: embeddings differ by"):
        export_onnx(loaded_model(tiny_config, tiny_tokenizer), tmp_path / "exported")
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_shared_space_is_refused(
    tiny_config: ModelConfig, tiny_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    fusion = {"kind": "gated", "width": 8}
    loaded = loaded_model(tiny_config, tiny_tokenizer, embedding_width=None, fusion=fusion, heads=["matching"])
    with pytest.raises(MisuseError, match=r"model\.embedding_width: null"):
        export_onnx(loaded, tmp_path / "exported")
