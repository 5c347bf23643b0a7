"""The corpus stage: the demonstration corpora that a recipe names, what tells them from others, and where each lies.

A writer puts a corpus into a directory, `records.jsonl` last and whole: a directory with it is a complete corpus. So a
run after a killed one goes on with the corpora that are not there yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmflow.core.progress import Report
from mmflow.core.storage import join
from mmflow.corpora.config import (
    CorpusConfig,
    EasyVqaConfig,
    EmojiStylesConfig,
    FashionMnistConfig,
    FluentEmojiAnimConfig,
    GimpHelpConfig,
    OpenclipartConfig,
    OpenmojiConfig,
)
from mmflow.corpora.easy_vqa import write_easy_vqa
from mmflow.corpora.emoji_packages import write_emoji_styles, write_fluent_emoji_anim
from mmflow.corpora.fashion_mnist import write_fashion_mnist
from mmflow.corpora.gimp_help import write_gimp_help
from mmflow.corpora.openclipart import write_openclipart
from mmflow.corpora.openmoji import write_openmoji
from mmflow.corpora.record_lines import RECORDS
from mmflow.sources.config import SourceConfig

PACKAGES = "package_directory"

Progress = Callable[[int, int], None]
"""(done, total)."""


def corpora_of(corpus: CorpusConfig | list[CorpusConfig]) -> list[CorpusConfig]:
    """The corpora that a recipe names, however many."""
    return corpus if isinstance(corpus, list) else [corpus]


def identity(corpora: Sequence[CorpusConfig]) -> dict[str, Any]:
    """What tells the corpora from any others: not where packages lie, since the same ones are the same corpus."""
    told = [corpus.model_dump(mode="json", exclude={PACKAGES}) for corpus in corpora]
    return told[0] if len(told) == 1 else {"corpora": told}


def places(uri: str, corpora: Sequence[CorpusConfig]) -> list[str]:
    """Where each corpus of the artifact at `uri` lies: one alone in `uri` itself, several in folders of their names."""
    return [uri] if len(corpora) == 1 else [join(uri, corpus.name) for corpus in corpora]


def sources_of(uri: str, corpora: Sequence[CorpusConfig]) -> list[SourceConfig]:
    """What `shard` reads of the artifact at `uri`: of two records with one key the first corpus's is kept."""
    return [SourceConfig(kind="jsonl", uri=join(place, RECORDS)) for place in places(uri, corpora)]


def write_corpora(directory: Path, corpora: Sequence[CorpusConfig], report: Report) -> dict[str, Any]:
    """Write the corpora that are not there yet; return the manifest's fields.

    Raises MisuseError where the packages that a corpus comes in cannot be had.
    """
    records = 0
    for corpus, place in zip(corpora, map(Path, places(str(directory), corpora)), strict=True):
        if not (place / RECORDS).exists():
            place.mkdir(parents=True, exist_ok=True)
            name = corpus.name if len(corpora) > 1 else ""
            WRITERS[corpus.name](place, corpus, partial(_report, report, name))
        with (place / RECORDS).open("rb") as lines:
            records += sum(1 for _ in lines)
    return {"records": records, "fingerprint": _directory_hash(directory)}


def _report(report: Report, name: str, done: int, total: int) -> None:
    report(done, total, name)


def _directory_hash(directory: Path) -> str:
    """sha256 over the names and bytes of a directory's files, those of the commit protocol aside."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if (path.is_file() and not path.name.startswith(".") and path.parent != directory) or path.suffix == ".jsonl":
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# --- the writers ------------------------------------------------------------------------------------------------------


def _openmoji(directory: Path, settings: OpenmojiConfig, progress: Progress) -> None:
    write_openmoji(
        directory,
        image_pixels=settings.image_pixels,
        unseen_concept_share=settings.unseen_concept_share,
        unseen_variant_share=settings.unseen_variant_share,
        seed=settings.seed,
        progress=progress,
    )


def _openclipart(directory: Path, settings: OpenclipartConfig, progress: Progress) -> None:
    write_openclipart(directory, package_directory=_path(settings.package_directory), progress=progress)


def _easy_vqa(directory: Path, settings: EasyVqaConfig, progress: Progress) -> None:
    write_easy_vqa(directory, progress=progress)


def _fashion_mnist(directory: Path, settings: FashionMnistConfig, progress: Progress) -> None:
    write_fashion_mnist(directory, package_directory=_path(settings.package_directory), progress=progress)


def _gimp_help(directory: Path, settings: GimpHelpConfig, progress: Progress) -> None:
    write_gimp_help(directory, package_directory=_path(settings.package_directory), progress=progress)


def _emoji_styles(directory: Path, settings: EmojiStylesConfig, progress: Progress) -> None:
    write_emoji_styles(
        directory,
        styles=settings.styles,
        unseen_concept_share=settings.unseen_concept_share,
        seed=settings.seed,
        package_directory=_path(settings.package_directory),
        progress=progress,
    )


def _fluent_emoji_anim(directory: Path, settings: FluentEmojiAnimConfig, progress: Progress) -> None:
    write_fluent_emoji_anim(
        directory,
        unseen_concept_share=settings.unseen_concept_share,
        unseen_clip_share=settings.unseen_clip_share,
        seed=settings.seed,
        package_directory=_path(settings.package_directory),
        progress=progress,
    )


def _path(directory: str | None) -> Path | None:
    return None if directory is None else Path(directory)


WRITERS: Mapping[str, Callable[[Path, Any, Progress], None]] = {
    "openmoji": _openmoji,
    "openclipart": _openclipart,
    "easy_vqa": _easy_vqa,
    "fashion_mnist": _fashion_mnist,
    "emoji_styles": _emoji_styles,
    "fluent_emoji_anim": _fluent_emoji_anim,
    "gimp_help": _gimp_help,
}
"""A corpus's name → what writes it into a directory, which may hold what a killed run left."""
