"""The demonstration corpora that a recipe can name: one table, and what writes them for `shard` to read.

A corpus's settings class is in its own file with its `write(directory, progress)`: a generator that puts the images
into the directory, which may hold what a killed run left, and yields the records. It raises MisuseError where packages
are missing or damaged. Importing this package stays light: what draws and unpacks is imported when a corpus is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Discriminator, Field, Tag

from mmflow.core.progress import Report
from mmflow.core.storage import join
from mmflow.corpora.easy_vqa import EasyVqaConfig
from mmflow.corpora.emoji_packages import EmojiStylesConfig, FluentEmojiAnimConfig, check_held_out_alike
from mmflow.corpora.fashion_mnist import FashionMnistConfig
from mmflow.corpora.gimp_help import GimpHelpConfig
from mmflow.corpora.openclipart import OpenclipartConfig
from mmflow.corpora.openmoji import OpenmojiConfig
from mmflow.sources.config import SourceConfig

CorpusConfig = Annotated[
    OpenmojiConfig
    | OpenclipartConfig
    | EasyVqaConfig
    | FashionMnistConfig
    | GimpHelpConfig
    | EmojiStylesConfig
    | FluentEmojiAnimConfig,
    Field(discriminator="name"),
]
"""A demonstration corpus; each has its own options."""

NUMBERED = ("easy_vqa", "fashion_mnist")  # their keys are only a split and a number, so they collide
RECORDS = "records.jsonl"
ONE_CORPUS, SEVERAL_CORPORA = "one corpus", "several corpora"  # pydantic's tags; a recipe's key has no space


def _check_together(corpora: list[CorpusConfig]) -> list[CorpusConfig]:
    names = [corpus.name for corpus in corpora]
    repeated = [name for number, name in enumerate(names) if name in names[:number]]
    if repeated:
        raise ValueError(f"{repeated[0]} is named twice; its records would be repeated")
    numbered = [name for name in names if name in NUMBERED]
    if len(numbered) > 1:
        raise ValueError(
            f"{' and '.join(numbered)} both name their records train-00000 and so on; shard each by a recipe of its "
            "own, and train on both by loader.mixture"
        )
    check_held_out_alike(corpora)
    return corpora


CorporaConfig = Annotated[
    Annotated[CorpusConfig, Tag(ONE_CORPUS)]
    | Annotated[list[CorpusConfig], Field(min_length=1), AfterValidator(_check_together), Tag(SEVERAL_CORPORA)],
    Discriminator(lambda corpus: SEVERAL_CORPORA if isinstance(corpus, list) else ONE_CORPUS),
]
"""One demonstration corpus, or a list of them."""


def corpora_of(corpus: CorpusConfig | list[CorpusConfig]) -> list[CorpusConfig]:
    """A recipe's corpora as a list."""
    return corpus if isinstance(corpus, list) else [corpus]


def identity(corpora: Sequence[CorpusConfig]) -> dict[str, Any]:
    """The settings that decide what the corpora hold."""
    settings = [corpus.identity() for corpus in corpora]
    return settings[0] if len(settings) == 1 else {"corpora": settings}


def sources_of(uri: str, corpora: Sequence[CorpusConfig]) -> list[SourceConfig]:
    """What `shard` reads from the artifact at `uri`. Of two records with one key, the first corpus's is kept."""
    return [SourceConfig(kind="jsonl", uri=join(place, RECORDS)) for place in _places(uri, corpora)]


def write_corpora(directory: Path, corpora: Sequence[CorpusConfig], report: Report) -> dict[str, Any]:
    """Write the corpora that are not there yet; return the manifest's fields.

    Raises MisuseError where a corpus's packages are missing or damaged.
    """
    records = 0
    for corpus, place in zip(corpora, map(Path, _places(str(directory), corpora)), strict=True):

        def progress(done: int, total: int, name: str = corpus.name if len(corpora) > 1 else "") -> None:
            report(done, total, name)

        if not (place / RECORDS).exists():
            write_corpus(place, corpus, progress)
        with (place / RECORDS).open("rb") as lines:
            records += sum(1 for _ in lines)
    return {"records": records, "fingerprint": _directory_hash(directory)}


def write_corpus(directory: Path, corpus: CorpusConfig, progress: Callable[[int, int], None]) -> None:
    """Write one corpus; `progress(done, total)` counts its records or pages.

    `records.jsonl` appears last and whole, so a directory with it is a complete corpus.
    """
    directory.mkdir(parents=True, exist_ok=True)
    staged = directory / f"{RECORDS}.staged"
    with staged.open("w", encoding="utf-8") as lines:
        for record in corpus.write(directory, progress):
            print(json.dumps(record, ensure_ascii=False, sort_keys=True), file=lines)
    staged.replace(directory / RECORDS)


def _places(uri: str, corpora: Sequence[CorpusConfig]) -> list[str]:
    """The directory of each corpus: a single corpus in `uri` itself, several in folders of their names."""
    return [uri] if len(corpora) == 1 else [join(uri, corpus.name) for corpus in corpora]


def _directory_hash(directory: Path) -> str:
    """sha256 over the names and bytes of a directory's files, without those of the commit protocol."""
    digest = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        if (path.is_file() and not path.name.startswith(".") and path.parent != directory) or path.suffix == ".jsonl":
            digest.update(f"{path.relative_to(directory)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()
