"""Teachers from where they lie: opened for a rank, each as far as its lessons need it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tokenizers import Tokenizer

from mmflow.core.errors import RecipeError
from mmflow.learning.cached import CachedTeacher
from mmflow.learning.distillation.config import LessonsConfig
from mmflow.learning.distillation.lessons import LIVE
from mmflow.learning.student import Teacher
from mmflow.loading.batches import Reading, ViewSettings
from mmflow.loading.tokens import read_tokenizer
from mmflow.models.package import Package, load_package, read_config, read_package, read_vocabulary


@dataclass(frozen=True, kw_only=True)
class TeacherPackage:
    """Where a teacher lies, and its caches; plain data, so that it travels to other machines."""

    package: str  # URI
    weight: float = 1.0
    caches: tuple[str, ...] = ()  # URIs, one for each dataset of the stage; none: it teaches live


def open_teachers(
    key: str,
    packages: Sequence[TeacherPackage],
    lessons: LessonsConfig,
    *,
    tokenizer: Tokenizer,
    max_tokens: int,
    frames: int,
    datasets: Sequence[str],
) -> tuple[Teacher, ...]:
    """The teachers, loaded unless their caches are all that the lessons ask for.

    `tokenizer`, `max_tokens` and `frames` are the student's, `datasets` the fingerprints of those it is trained on,
    `key` the recipe's, for errors. Raises RecipeError for a teacher of stills that would be shown clips, and as
    `load_package` and `CachedTeacher`.
    """
    live = any(name in LIVE for name in lessons.named)
    teachers = []
    for each in packages:
        package = read_package(each.package)
        cached = CachedTeacher(each.caches, datasets, package.digest) if each.caches else None
        if cached is not None and not live:
            teachers.append(Teacher(weight=each.weight, cached=cached))
            continue
        loaded = load_package(package)
        if frames and loaded.config.video is None:
            raise RecipeError(f"{key}.loader.frames: {frames}, and the teacher {each.package} sees stills; set it to 0")
        reading = own_reading(package, tokenizer, max_tokens)
        teachers.append(Teacher(weight=each.weight, loaded=loaded, cached=cached, reading=reading))
    return tuple(teachers)


def own_reading(package: Package, tokenizer: Tokenizer, max_tokens: int) -> Reading | None:
    """How a teacher reads texts; None for one that reads the tokens of a student with this tokenizer and length."""
    theirs = read_tokenizer(read_vocabulary(package)[0])
    most = read_config(package).max_tokens
    return None if theirs.to_str() == tokenizer.to_str() and max_tokens <= most else Reading(theirs, most)


def views_of_teacher(views: ViewSettings, package: Package, tokenizer: Tokenizer) -> ViewSettings:
    """The student's views as a teacher sees them by itself: at its own size, and in its own words where it has others,
    of which none is dropped."""
    views = replace(views, image_pixels=read_config(package).image_pixels)
    reading = own_reading(package, tokenizer, views.max_tokens)
    if reading is None:
        return views
    augment = views.augment.model_copy(update={"token_dropout": 0.0})
    return replace(views, max_tokens=reading.max_tokens, augment=augment)
