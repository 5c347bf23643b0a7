"""easy-VQA: 5,000 pictures of one coloured shape and 48,248 questions about them, from pip.

No picture has a caption. Each has about ten questions with one answer in its metadata, where `loader.text: questions`
finds them. The package's own split into train and test is kept.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from mmflow.core.config import Config
from mmflow.core.errors import MisuseError


class EasyVqaConfig(Config):
    """Questions and answers about drawn shapes, from a package that pip installs."""

    name: Literal["easy_vqa"]
    """easy_vqa: 48,248 questions with one of 13 answers on 5,000 pictures that have no captions; splits train, test."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        """Copy the pictures to `images/`; their records, train before test, in the order of the pictures' numbers."""
        try:
            import easy_vqa
        except ImportError as error:
            raise MisuseError("the package easy-vqa is not installed: pip install 'mmflow[easy-vqa]'") from error
        splits = {
            "train": (easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()),
            "test": (easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()),
        }
        total = sum(len(paths) for paths, _ in splits.values())
        (directory / "images").mkdir(exist_ok=True)
        done = 0
        for split, (paths, (texts, answers, numbers)) in splits.items():
            questions_of_picture = defaultdict(list)
            for text, answer, number in zip(texts, answers, numbers, strict=True):
                questions_of_picture[number].append({"question": text, "answers": [answer]})
            for number, path in sorted(paths.items()):
                key = f"{split}-{number:05d}"
                shutil.copyfile(path, directory / "images" / f"{key}.png")
                yield {
                    "key": key,
                    "image": f"images/{key}.png",
                    "split": split,
                    "questions": questions_of_picture[number],
                    "license": "MIT",
                }
                done += 1
                progress(done, total)
