"""What an examination is: what it asks of a model, the rows that it reads, the metrics and details that it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mmflow.core.errors import MisuseError
from mmflow.dataset.opened import Dataset
from mmflow.dataset.reader import Reader, Sample
from mmflow.inference.result import Gives, Result, Stored, embeddings_of
from mmflow.inference.runner import Model
from mmflow.inference.tasks.answer import question_entries
from mmflow.inference.tasks.embed import AllCaptionEmbeddings, ImageEmbeddings, captions_in
from mmflow.models.package import read_config, read_package, read_vocabulary
from mmflow.training.config import DistillConfig, PretrainConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from mmflow.inference.predict import Predictor
    from mmflow.learning.tiled_ranks import BothWays
    from mmflow.models.config import ModelConfig

Trained = Mapping[str, PretrainConfig | DistillConfig]  # a recipe's training stages by name
Metrics = dict[str, Any]
Embeddings = NDArray[np.float32]

NEAREST = 5  # pictures that are kept for each caption

# The files of an evaluation.
METRICS = "metrics.json"  # {split: {"rows", "left_out": rows that failed, "models": {model: metrics}}}
DETAILS = "details.json"  # {model: {split: {name: what people read}}}; names are those of the examinations' details
# {model: {"latency_ms", "pictures_per_second"}}; not part of the fingerprint, because it is never the same twice
SPEED = "speed.json"

SHOWN = 24  # captions and answers that are kept for people to read


@dataclass(frozen=True)
class Captions:
    """All captions of a split in one language, in the order of its rows; a picture may have several."""

    texts: tuple[str, ...]
    rows: NDArray[np.int64]  # (texts,): the row that each text describes

    @classmethod
    def of(cls, samples: Sequence[Sample], language: str) -> Captions:
        """The samples' captions in a language."""
        pairs = [(row, text) for row, sample in enumerate(samples) for text in captions_in(sample.captions, language)]
        return cls(tuple(text for _, text in pairs), np.array([row for row, _ in pairs], dtype=np.int64))

    @cached_property
    def pictures(self) -> NDArray[np.int64]:
        """The rows that have a caption, ascending."""
        return np.unique(self.rows)

    @cached_property
    def picture_of_text(self) -> NDArray[np.int64]:
        """(texts,): the place of each text's row among `pictures`."""
        return np.searchsorted(self.pictures, self.rows).astype(np.int64)

    @cached_property
    def texts_of_picture(self) -> list[list[str]]:
        """The texts of each of `pictures`."""
        texts: list[list[str]] = [[] for _ in self.pictures]
        for text, picture in zip(self.texts, self.picture_of_text, strict=True):
            texts[picture].append(text)
        return texts


@dataclass(frozen=True)
class Question:
    """A question about the picture of a row, and what people answered."""

    row: int
    number: int  # among the questions about the picture
    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """A held-out split, the same for every model: the rows that could be read, in order."""

    reader: Reader
    samples: Sequence[Sample]  # without pictures
    places: Sequence[tuple[int, int]]  # of each: its shard's place in the reader, and its row there
    captions: Mapping[str, Captions]  # by language; the first is the one that headline figures and gates use
    errors: Sequence[str]  # why the other rows of the split are not among these

    @classmethod
    def of(
        cls,
        reader: Reader,
        samples: Sequence[Sample],
        places: Sequence[tuple[int, int]],
        languages: Sequence[str],
        errors: Sequence[str],
    ) -> Rows:
        """With the captions in these languages."""
        captions = {language: Captions.of(samples, language) for language in languages}
        return cls(reader, samples, places, captions, errors)

    def without(self, failed: Mapping[int, str]) -> Rows:
        """The rows but those that failed (row → error)."""
        kept = [row for row in range(len(self.samples)) if row not in failed]
        samples, places = [self.samples[row] for row in kept], [self.places[row] for row in kept]
        errors = [*self.errors, *(failed[row] for row in sorted(failed))]
        return Rows.of(self.reader, samples, places, list(self.captions), errors)

    @property
    def split(self) -> str:
        """Its name."""
        return self.reader.split

    @cached_property
    def numbers(self) -> NDArray[np.int64]:
        """Where each row stands among all rows of the split."""
        starts = np.cumsum([0, *(shard.samples for shard in self.reader.shards)])
        return np.array([starts[shard] + row for shard, row in self.places], dtype=np.int64)

    @property
    def main_captions(self) -> Captions:
        """Those of the first language."""
        return next(iter(self.captions.values()))

    def reference(self, row: int) -> dict[str, Any]:
        """{"key", "shard", "row"}: how details name a sample, so that its picture is found without a search."""
        shard, row_in_shard = self.places[row]
        return {"key": self.samples[row].key, "shard": self.reader.shards[shard].name, "row": row_in_shard}

    def with_picture(self, row: int) -> Sample:
        """The sample as it is stored, read now. Raises as `Reader.read`."""
        return self.reader.read(*self.places[row])

    def labels(self, label: str) -> list[str | None]:
        """The class of each row; None where it has none."""
        classes = [sample.metadata.get("classes") for sample in self.samples]
        return [fields.get(label) if isinstance(fields, dict) else None for fields in classes]

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Every question with an answer. Raises MisuseError where there is none."""
        questions = []
        for row, sample in enumerate(self.samples):
            for number, entry in enumerate(question_entries(sample)):
                if entry.get("answers"):
                    questions.append(Question(row, number, entry["question"], tuple(map(str, entry["answers"]))))
        if not questions:
            raise MisuseError(
                f"evaluate.answering: no answered question in split {self.split!r}; its samples' metadata need "
                '"questions": [{"question": "…", "answers": ["…"]}, …]'
            )
        return tuple(questions)


def read_rows(dataset: Dataset, split: str, languages: Sequence[str]) -> Rows:
    """A split's samples without their pictures, and their captions. Samples that are not what was committed are left
    out."""
    reader = Reader(dataset, split, frames=False)
    samples, places, errors = list[Sample](), list[tuple[int, int]](), list[str]()
    for shard, info in enumerate(reader.shards):
        for attempt in reader.attempts(shard, 0, info.samples, image=False):
            if attempt.sample is None:
                errors.append(str(attempt.error).split("; ")[0])
            else:
                samples.append(attempt.sample)
                places.append((shard, attempt.row))
    return Rows.of(reader, samples, places, languages, errors)


@dataclass(frozen=True)
class Subject:
    """A model and the rows that it is examined on. What it says of them was computed before, by whatever machines."""

    model: Model
    rows: Rows
    store: str  # URI of the results
    batch_size: int = 256
    found: dict[str, Any] = field(default_factory=dict, init=False)  # by `asks_then`, for `examine`; no large arrays

    @cached_property
    def config(self) -> ModelConfig:
        """The model's settings."""
        return read_config(read_package(self.model.package))

    @property
    def gives(self) -> Gives:
        """What the model can be asked for."""
        return Gives(self.config.gives)

    @cached_property
    def vocabulary(self) -> tuple[Tokenizer, tuple[str, ...]]:
        """The model's tokenizer and classes."""
        from mmflow.loading.tokens import read_tokenizer

        tokenizer, classes = read_vocabulary(read_package(self.model.package))
        return read_tokenizer(tokenizer), classes

    def lengths(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """The number of tokens that the model reads of each text."""
        from mmflow.loading.tokens import tokenise

        cut = tokenise(self.vocabulary[0], texts, self.config.max_tokens)
        return np.array([len(ids) for ids in cut], dtype=np.int64)

    @cached_property
    def predictor(self) -> Predictor:
        """The model itself, on this machine, for a few rows."""
        from mmflow.inference.predict import Predictor

        return Predictor(self.model.load(), self.batch_size)

    @cached_property
    def captions_AW(self) -> Embeddings:
        """The captions in the first language, of a model that gives embeddings."""
        return self.caption_embeddings(AllCaptionEmbeddings(language=self.language))

    @cached_property
    def ranks(self) -> BothWays:
        """Of these captions and their pictures, with the nearest pictures of each caption."""
        return self.ranks_of(self.rows.main_captions, self.captions_AW)

    def ranks_of(self, captions: Captions, texts_AW: Embeddings, change: str = "") -> BothWays:
        """Ranks between captions, given as embeddings, and the pictures that have one, as they are or changed."""
        from mmflow.learning.tiled_ranks import ranks_both_ways

        images_NW = self.image_embeddings(change)[captions.pictures]
        return ranks_both_ways(texts_AW, images_NW, captions.picture_of_text, nearest=NEAREST)

    @property
    def language(self) -> str:
        """The first language, which headline figures and gates use."""
        return next(iter(self.rows.captions))

    def column(self, result: Result, name: str) -> pa.ChunkedArray:
        """A column of a result, a value for each of the rows."""
        stored = Stored(self.store, self.model.digest, result)
        shards = [stored.read(shard, [name]) for shard in self.rows.reader.shards]
        return pa.concat_tables(shards)[name].take(pa.array(self.rows.numbers))

    def image_embeddings(self, change: str = "") -> Embeddings:
        """(rows, width) fp32 of the pictures, as they are or changed."""
        result = ImageEmbeddings(change=change)
        return embeddings_of(self.column(result, result.column))

    def caption_embeddings(self, result: AllCaptionEmbeddings) -> Embeddings:
        """(captions, width) fp32 of all captions in the result's language; NaN where nothing could be changed."""
        return embeddings_of(self.column(result, "caption_embeddings").combine_chunks().flatten())


@dataclass(frozen=True)
class Outcome:
    """What an examination found in one model on one split."""

    metrics: Metrics = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)  # for people, by the name that the report shows them under


@dataclass(frozen=True, kw_only=True)
class Examination:
    """One way to examine a model. `section` is that of the recipe, None for one that has no settings."""

    needs: tuple[Gives, ...]
    """What the model must give: everything in one of these."""
    remedy: str
    """What a recipe must name so that its model gives it, for the error."""
    asks: Callable[[Any, Sequence[str], Gives], tuple[Result, ...]] = lambda section, languages, gives: ()
    """(section, languages of the captions, what the model gives) → what is computed of every row."""
    asks_then: Callable[[Subject, Any], tuple[Result, ...]] = lambda subject, section: ()
    """(subject, section) → what is computed after that, when the subject has it."""
    examine: Callable[[Subject, Any], Outcome]
    """(subject, section) → metrics and details."""
    chance: Callable[[Rows, Any], Metrics] = lambda rows, section: {}
    """(rows, section) → what guessing would reach, by the same names."""
    check: Callable[[Any, Trained], None] = lambda section, trained: None
    """(section, training stages): raises RecipeError for what `needs` cannot tell."""
    check_rows: Callable[[Rows], object] = lambda rows: None
    """Raises MisuseError for what a split lacks, before anything is computed."""
    reads_captions: Gives | None = frozenset()
    """A model with all of these needs captions: every model by default, none for None."""
    measures: bool = True
    """False: it gives no metrics, only details, of the first split and the trained models."""

    def fits(self, gives: Gives) -> bool:
        """Whether a model can be examined in it."""
        return any(needed <= gives for needed in self.needs)


def spread(count: int, shown: int = SHOWN) -> list[int]:
    """Up to `shown` of the places 0 to count-1, evenly spread."""
    shown = min(shown, count)
    return [number * count // shown for number in range(shown)]


def flatten(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested metrics as one level: {"unseen_variants/text_to_image/R@1": 0.61, …}, the names that gates use.

    None, which is written for a number that is not finite, becomes NaN, and no gate lets that pass.
    """
    flat: dict[str, float] = {}
    for name, value in metrics.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(value, Mapping):
            flat |= flatten(value, path)
        else:
            flat[path] = math.nan if value is None else float(value)
    return flat
