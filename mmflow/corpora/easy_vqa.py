"""The corpus of questions: easy-VQA's 5,000 pictures of one coloured shape and 48,248 questions on them, from pip.

No picture has a caption; each has some ten questions of one answer each in its metadata, where `loader.text: questions`
finds them. The package's own split into train and test is kept.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from mmflow.core.errors import MisuseError
from mmflow.corpora.record_lines import record_lines

LICENSE = "MIT"


def write_easy_vqa(directory: Path, *, progress: Callable[[int, int], None] | None = None) -> int:
    """Copy the pictures into `directory/images` and write what is asked of them; return the number of pictures.

    `records.jsonl`, train before test and each in the order of the pictures' numbers, appears last and whole: a
    directory with it is a complete corpus. `progress(done, total)` is called after each picture.

    Raises MisuseError where the package of `mmflow[easy-vqa]` is missing.
    """
    try:
        import easy_vqa
    except ImportError as error:
        raise MisuseError("the package easy-vqa is not installed: pip install 'mmflow[easy-vqa]'") from error
    splits = {
        "train": (easy_vqa.get_train_image_paths(), easy_vqa.get_train_questions()),
        "test": (easy_vqa.get_test_image_paths(), easy_vqa.get_test_questions()),
    }
    total = sum(len(paths) for paths, _ in splits.values())
    (directory / "images").mkdir(parents=True, exist_ok=True)
    done = 0
    with record_lines(directory) as write:
        for split, (paths, (texts, answers, numbers)) in splits.items():
            questions_of_picture = defaultdict(list)
            for text, answer, number in zip(texts, answers, numbers, strict=True):
                questions_of_picture[number].append({"question": text, "answers": [answer]})
            for number, path in sorted(paths.items()):
                key = f"{split}-{number:05d}"
                shutil.copyfile(path, directory / "images" / f"{key}.png")
                record = {
                    "key": key,
                    "image": f"images/{key}.png",
                    "split": split,
                    "questions": questions_of_picture[number],
                    "license": LICENSE,
                }
                write(record)
                done += 1
                if progress is not None:
                    progress(done, total)
    return done
