"""Images to a dataset: `mmflow shard` compared with img2dataset, Ray Data, and the codecs alone."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks import data, peers
from tests.benchmarks.measure import CORES, SCRATCH, SHARE, Finished, call, mmflow, rounds, warm
from tests.benchmarks.table import Row, faster

KEEP_ALL = ["shard.captions={}", "shard.duplicates={exact: false}"]
SIDE, QUALITY, MAX_PIXELS = 256, 90, 80_000_000
START_RECORDS = 16
RAY_DATA_SHARE = 0.2  # of the set: the whole would take longer than all other benchmarks
PEERS = ("img2dataset", "opencv-python-headless", "albumentations")
VERSIONS = ("ray", "pyarrow", "pillow", "simplejpeg", "numpy")


def run() -> list[Row]:
    """Both sets, each by every contestant in turn."""
    # Nothing is left out of the JPEGs, so that all contestants write 5,000. openclipart is cleaned as its recipe says.
    return [
        *_compare("openclipart", data.openclipart(), []),
        *_compare("JPEGs of 1–2 megapixels", data.jpegs(), KEEP_ALL),
    ]


def shard(records: Path, overrides: list[str], *, watch: bool = False) -> tuple[Finished, Path]:
    """`mmflow shard` on a fresh workspace; the finished command, and the dataset's folder."""
    workspace = SCRATCH / "runs" / "mmflow"
    shutil.rmtree(workspace, ignore_errors=True)
    source = f"shard.sources=[{{kind: jsonl, uri: {json.dumps(str(records))}}}]"
    finished = mmflow(
        "shard", str(data.RECIPE), "corpus=null", source, f"workspace={workspace}", *overrides, watch=watch
    )
    (manifest,) = (workspace / "shard").glob("*/manifest.json")
    return finished, manifest.parent


def _compare(name: str, whole: Path, overrides: list[str]) -> list[Row]:
    records = data.share_of(whole, round(SHARE * sum(1 for _ in data.read(whole))))
    entries = list(data.read(records))
    images = [(records.parent / entry["image"]).resolve() for entry in entries]
    count = len(entries)
    start = data.share_of(records, min(START_RECORDS, count))
    table = SCRATCH / "runs" / "urls.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    captions = [entry["captions"][0]["text"] if entry["captions"] else "" for entry in entries]
    pq.write_table(pa.table({"url": [image.as_uri() for image in images], "caption": captions}), table)
    # One image past Pillow's bound ends Ray Data's whole job, so those are left out for it.
    step = round(1 / RAY_DATA_SHARE)
    few = [str(image) for image in images[::step] if _pixels(image) <= MAX_PIXELS]
    paths = [str(image) for image in images if _pixels(image) <= MAX_PIXELS]
    print(f"build: {name}: {count:,} records", flush=True)
    peers.python()
    warm(images)
    commands: list[float] = []

    def ours() -> float:
        commands.append(shard(records, overrides)[0].seconds)
        return count / commands[-1]

    def steady() -> float:
        # The same command over a few records measures the fixed cost: imports, Ray's start and end.
        return without_start(count, commands[-1], shard(start, overrides)[0].seconds)

    def img2dataset() -> float:
        output = SCRATCH / "runs" / "img2dataset"
        shutil.rmtree(output, ignore_errors=True)
        finished = peers.img2dataset(table, output, side=SIDE, quality=QUALITY, max_pixels=MAX_PIXELS)
        done = sum(json.loads(path.read_text())["count"] for path in output.glob("*_stats.json"))
        if done != count:
            raise RuntimeError(f"img2dataset counts {done} of {count} images")
        return count / finished.seconds

    def ray_data() -> float:
        output = SCRATCH / "runs" / "ray"
        shutil.rmtree(output, ignore_errors=True)
        return len(few) / call("tests.benchmarks.build:ray_data", paths=few, output=str(output))

    def bare() -> float:
        return len(paths) / call("tests.benchmarks.build:bare_loop", paths=paths)

    found = rounds({"mmflow": ours, "steady": steady, "img2dataset": img2dataset, "ray": ray_data, "bare": bare})
    ray_note = f"every {step}th image; Ray's start not counted for Ray Data" if step > 1 else ""
    if len(paths) < count:
        ray_note += ", nor those past 80 megapixels given to it"
    rows = [
        faster(f"{name}: whole command", found["mmflow"], "img2dataset", found["img2dataset"], goal=3,
               note="file:// addresses, 2 processes"),
        faster(f"{name}: whole command", found["mmflow"], "ray.data read_images → map → write_webdataset",
               found["ray"], goal=5, note=ray_note),
    ]  # fmt: skip
    if not any(map(math.isnan, found["steady"])):
        note = f"less the time of the command over {START_RECORDS} records"
        peer = "bare loop of decode, resize, encode"
        rows.append(faster(f"{name}: without start", found["steady"], peer, found["bare"], goal=0.85, note=note))
    return rows


def without_start(count: int, seconds: float, start_seconds: float) -> float:
    """Samples/s of a command without its start; NaN if the start is most of it, because the rest would be noise."""
    return count / (seconds - start_seconds) if seconds >= 2 * start_seconds else math.nan


def _pixels(path: Path) -> int:
    """From the header; Pillow's own bound would stop the benchmark."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as image:
        return image.width * image.height


# --- contestants, each called in a process of its own -----------------------------------------------------------------


def ray_data(paths: list[str], output: str) -> float:
    """Seconds that Ray Data takes, from a running Ray to the tars."""
    import numpy as np
    import ray
    from PIL import Image

    def shrink(row: dict[str, Any]) -> dict[str, Any]:
        image = Image.fromarray(np.asarray(row["image"]))
        shortest = min(image.size)
        if shortest > SIDE:
            width, height = (round(side * SIDE / shortest) for side in image.size)
            image = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=QUALITY)
        return {"__key__": Path(row["path"]).stem.replace(".", "-"), "jpg": stream.getvalue(), "txt": b"a drawing"}

    ray.init(address="local", num_cpus=CORES, include_dashboard=False, logging_level="ERROR")
    began = time.perf_counter()
    images = ray.data.read_images(paths, mode="RGB", include_paths=True)
    images.map(shrink).write_webdataset(output, encoder=None)
    seconds = time.perf_counter() - began
    ray.shutdown()
    return seconds


def bare_loop(paths: list[str]) -> float:
    """Seconds that the codecs take on the same cores, without anything around them."""
    # Large and small are mixed, as they are in a shuffle, and the last ones are small: no core waits for the other.
    ordered = sorted(paths, key=lambda path: -Path(path).stat().st_size)
    with multiprocessing.get_context("spawn").Pool(CORES) as pool:
        pool.map(shrink_file, ordered[-CORES * 4 :], chunksize=1)  # imports
        began = time.perf_counter()
        for _ in pool.imap_unordered(shrink_file, ordered, chunksize=4):
            pass
        return time.perf_counter() - began


def shrink_file(path: str) -> int:
    """Decode over white, resize, encode as `mmflow.cleaning.images` does; the JPEG's bytes."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    body = Path(path).read_bytes()
    if path.endswith(".jpg"):
        picture = Image.fromarray(simplejpeg.decode_jpeg(body, min_height=SIDE, min_width=SIDE))
    else:
        picture = Image.open(io.BytesIO(body))
        if "transparency" in picture.info or picture.mode in ("LA", "RGBA"):
            drawing = picture.convert("RGBA")
            picture = Image.new("RGB", drawing.size, "white")
            picture.paste(drawing, mask=drawing)
        picture = picture.convert("RGB")
    shortest = min(picture.size)
    if shortest > SIDE:
        width, height = (round(side * SIDE / shortest) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=2.0)
    return len(simplejpeg.encode_jpeg(np.asarray(picture), quality=QUALITY, colorsubsampling="444"))
