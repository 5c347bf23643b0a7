"""Scoring: pictures and captions of JPEG shards to embeddings; compared with a bare loop, clip-retrieval and Ray Data.

All read the same bytes, in fp32 on all cores, and all but the bare loop write the embeddings of both sides.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mmflow.core.artifacts import content_hash
from tests.benchmarks import data, peers
from tests.benchmarks.measure import CORES, ROOT, SCRATCH, SHARE, call, rate_after_start, rounds, warm
from tests.benchmarks.table import Row, faster

QUICKSTART = ROOT / "pipelines" / "quickstart.yaml"
IMAGE = "shard.image={resize: shortest, side: 224, quality: 90}"
VIT_B_32 = {
    "image": {
        "type": "clip_vision_model",
        "options": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                    "patch_size": 32, "projection_dim": 512, "hidden_act": "gelu"},
        "pooling": "pooler",
    },
    "text": {
        "type": "clip_text_model",
        "options": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048,
                    "max_position_embeddings": 77, "hidden_act": "gelu"},
        "pooling": "last",
    },
    "embedding_width": 512, "image_pixels": 224, "max_tokens": 77,
}  # fmt: skip
OPEN_CLIP_VIT_B_32 = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
}
# open_clip has neither BERT nor the quickstart's residual net. Its own net of as many blocks has 359,000 parameters for
# the quickstart's 334,000, and takes 1.1 times as long; its text tower has BERT's width, layers and length.
OPEN_CLIP_STUDENT = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
VOCABULARY_SIZE = 3000
PEERS = ("clip_retrieval", "open_clip_torch", "torchvision")
VERSIONS = ("torch", "transformers", "ray", "simplejpeg", "pillow", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, with sets that take every contestant seconds, not minutes."""

    name: str
    model: dict[str, Any]
    open_clip: dict[str, Any]
    batch: int
    samples_per_shard: int
    few: int
    """Shards of the set whose time is deducted; more than can be prepared while an actor loads the model. The set of
    clip-retrieval too: its own statistics leave its start out."""
    more: int
    """Further shards of the set that is measured."""


def run() -> list[Row]:
    """Both sizes by every contestant in turn; the start of each is left out."""
    student = yaml.safe_load(QUICKSTART.read_text(encoding="utf-8"))["distill"]["model"]
    return [
        *_compare(Size(name="quickstart-student", model=student, open_clip=OPEN_CLIP_STUDENT, batch=64,
                       samples_per_shard=512, few=8, more=48)),
        *_compare(Size(name="ViT-B-32-sized", model=VIT_B_32, open_clip=OPEN_CLIP_VIT_B_32, batch=16,
                       samples_per_shard=32, few=2, more=4)),
    ]  # fmt: skip


def _compare(size: Size) -> list[Row]:
    package = SCRATCH / f"scoring-{size.name}-{content_hash(size.model)[:8]}"
    few = _prepare(size, package, size.few)
    many = _prepare(size, package, size.few + max(1, round(SHARE * size.more)))
    open_clip = peers.clip_retrieval_model(size.open_clip, size.name)

    def figure(name: str, dataset: Path) -> float:
        arguments = {"uri": str(dataset), "package": str(package), "batch": size.batch}
        return float(call(f"tests.benchmarks.scoring:{name}", **arguments))

    def after_start(name: str) -> float:
        return rate_after_start(*((each.rows, figure(name, each.dataset)) for each in (many, few)))

    def clip_retrieval() -> float:
        output = SCRATCH / "runs" / "clip-retrieval"
        shutil.rmtree(output, ignore_errors=True)
        return peers.clip_retrieval(few.dataset / "shards", output, model=open_clip, batch=size.batch, count=few.rows)

    found = rounds({
        "ours": partial(after_start, "ours"),
        "bare loop": partial(figure, "bare_loop", many.dataset),
        "clip-retrieval": clip_retrieval,
        "ray.data": partial(after_start, "ray_data"),
    })  # fmt: skip
    name = f"{size.name}: embed pictures and captions"
    tokens = size.open_clip["text_cfg"]["context_length"]
    return [
        faster(name, found["ours"], "bare loop", found["bare loop"], unit="rows/s", goal=0.95,
               note=f"the same decode and forward, from memory; {many.rows:,} rows, batch {size.batch}"),
        faster(name, found["ours"], "clip-retrieval inference", found["clip-retrieval"], unit="rows/s", goal=1.5,
               note=f"the same tars, an open_clip model of this size; {few.rows:,} rows, each of {tokens} tokens"),
        faster(name, found["ours"], "ray.data read_images → map → map_batches", found["ray.data"], unit="rows/s",
               goal=2, note=f"the same JPEGs as files, the same model; both less the time of {few.rows:,} rows"),
    ]  # fmt: skip


class Prepared(NamedTuple):
    """A dataset and its rows."""

    dataset: Path
    rows: int


def _prepare(size: Size, package: Path, shards: int) -> Prepared:
    """JPEGs with a shortest side of 224 pixels, in shards of about equal size; made once."""
    shape = f"shard.samples_per_shard={size.samples_per_shard}"
    dataset = data.dataset("scoring", shards * size.samples_per_shard, IMAGE, shape)
    rows = call("tests.benchmarks.scoring:prepare", uri=str(dataset), model=size.model, package=str(package))
    warm([*(dataset / "shards").iterdir(), *_files(str(dataset)).iterdir()])
    return Prepared(dataset, rows)


def _files(uri: str) -> Path:
    """The dataset's JPEGs and captions as files, for Ray Data."""
    return Path(f"{uri}.files")


# --- called in a process of its own -----------------------------------------------------------------------------------


def prepare(uri: str, model: dict[str, Any], package: str) -> int:
    """Write a package with random weights, and the dataset's bodies as files, each once; returns the dataset's rows."""
    from mmflow.core.storage import exists
    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.models.config import ModelConfig
    from mmflow.models.encoders import parameter_count
    from mmflow.models.model import build
    from mmflow.models.package import CARD, write_package

    if not exists(f"{package}/{CARD}"):
        config = ModelConfig.model_validate(model)
        tokenizer = data.tokenizer_of(uri, VOCABULARY_SIZE)
        built = build("model", config, tokenizer.get_vocab_size(), seed=0)
        write_package(package, state=built.state_dict(), config=config, tokenizer_json=tokenizer.to_str(),
                      parameters=parameter_count(built), lineage={})  # fmt: skip
    dataset, files = open_dataset(uri), _files(uri)
    if not files.exists():
        staged = files.with_suffix(".staged")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        for sample in (sample for split in dataset.splits for sample in Reader(dataset, split)):
            (staged / f"{sample.key}.jpg").write_bytes(sample.image)
            (staged / f"{sample.key}.txt").write_text(sample.captions[0].text, encoding="utf-8")
        staged.rename(files)
    return sum(dataset.samples(split) for split in dataset.splits)


def ours(uri: str, package: str, batch: int) -> float:
    """Seconds of the stage `score` on a running Ray."""
    import ray

    from mmflow.inference.config import EmbedConfig, ScoreConfig, TasksConfig
    from mmflow.inference.runner import Model
    from mmflow.inference.score import Scored, score

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    tasks = TasksConfig(embed=EmbedConfig())
    scored = Scored(model=Model(package=package), datasets=(("scoring", uri),), tasks=tasks, splits=None)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as output:
        began = time.perf_counter()
        score(f"{output}/scores", f"{output}/results", scored, ScoreConfig(num_workers=CORES, batch_size=batch),
              lambda done, total, note: None)  # fmt: skip
        seconds = time.perf_counter() - began
    ray.shutdown()
    return seconds


def bare_loop(uri: str, package: str, batch: int) -> float:
    """Rows a second of libjpeg's scaled decoding, the resize, the tokenizer and both towers, from files in memory.

    Every part has all cores to itself: pictures in threads, both towers in torch's.
    """
    import numpy as np
    import simplejpeg
    import torch

    from mmflow.dataset.opened import open_dataset
    from mmflow.dataset.reader import Reader
    from mmflow.imaging.decode import LEAST_FACTOR
    from mmflow.imaging.resample import resample
    from mmflow.loading.batches import normalise
    from mmflow.models.package import load_package, read_package

    torch.set_num_threads(CORES)
    cores = ThreadPoolExecutor(CORES)
    loaded = load_package(read_package(package))
    side, mean, std = loaded.config.image_pixels, loaded.config.pixel_mean, loaded.config.pixel_std
    dataset = open_dataset(uri)
    samples = [sample for split in dataset.splits for sample in Reader(dataset, split)]

    def view(body: bytes) -> Any:
        pixels = simplejpeg.decode_jpeg(body, min_height=side, min_width=side, min_factor=LEAST_FACTOR)
        height, width, _ = pixels.shape
        edge = min(height, width)
        left, top = (width - edge) // 2, (height - edge) // 2
        return resample(pixels, side, (left, top, left + edge, top + edge))

    began = 0.0
    for start in range(0, len(samples), batch):
        rows = samples[start : start + batch]
        views = list(cores.map(view, [sample.image for sample in rows]))
        pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        _embed(loaded, normalise(pixels, mean, std), [sample.captions[0].text for sample in rows])
        began = began or time.perf_counter()  # the first batch warms up
    return (len(samples) - batch) / (time.perf_counter() - began)


def ray_data(uri: str, package: str, batch: int) -> float:
    """Seconds of the program of https://docs.ray.io/en/latest/data/working-with-images.html#performing-inference-on-images
    on a running Ray.

    Added: colours are normalised, captions are read beside the pictures, results are written. torchvision's transforms
    are written out: it has no build for a CPU's torch. One actor instead of two, which would take both cores of this
    machine and leave none to read.
    """
    import ray
    import torch
    from torch.nn.functional import interpolate

    from mmflow.models.package import load_package, read_config, read_package

    config = read_config(read_package(package))
    side = config.image_pixels
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.pixel_mean, config.pixel_std))

    def transform_image(row: dict[str, Any]) -> dict[str, Any]:
        image = torch.from_numpy(row["image"]).permute(2, 0, 1).float().div(255)
        image = interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
        row["image"] = ((image - mean) / std).numpy()
        row["caption"] = Path(row["path"]).with_suffix(".txt").read_text(encoding="utf-8")
        return row

    class Embedder:
        def __init__(self) -> None:
            self.loaded = load_package(read_package(package))

        def __call__(self, rows: dict[str, Any]) -> dict[str, Any]:
            images, captions = _embed(self.loaded, torch.from_numpy(rows["image"]), rows["caption"].tolist())
            return {"path": rows["path"], "image": images, "caption": captions}

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    with tempfile.TemporaryDirectory(dir=SCRATCH) as output:
        began = time.perf_counter()
        images = ray.data.read_images(str(_files(uri)), mode="RGB", include_paths=True, file_extensions=["jpg"])
        predictions = images.map(transform_image).map_batches(
            Embedder, compute=ray.data.ActorPoolStrategy(size=1), batch_size=batch
        )
        predictions.write_parquet(output)
        seconds = time.perf_counter() - began
    ray.shutdown()
    return seconds


def _embed(loaded: Any, pixels_B3SS: Any, captions: list[str]) -> tuple[Any, Any]:
    """(B, W) float16 each, of the pictures and the captions."""
    import torch

    from mmflow.loading.tokens import pad, special_tokens, tokenise

    ids_BT, mask_BT = pad(
        tokenise(loaded.tokenizer, captions, loaded.config.max_tokens), special_tokens(loaded.tokenizer).pad
    )
    model = loaded.model
    with torch.inference_mode():
        images_BW = model.embed_image(model.encode_image(pixels_B3SS))
        captions_BW = model.embed_text(model.encode_text(torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)))
    return images_BW.half().numpy(), captions_BW.half().numpy()
