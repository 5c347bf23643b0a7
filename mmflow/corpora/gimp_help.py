"""The long-text corpus: GIMP's manual as Debian packages it, GFDL, pictures with a caption and the section around each.

The two texts of a picture carry tags of their own, so that a recipe can weigh one against the other in training and
examine each by itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from mmflow.corpora.debian import package_tree
from mmflow.corpora.record_lines import record_lines
from mmflow.sources.html import Page, Picture, parse_page, section_of, text_of

PACKAGE = "gimp-help-en"
INSTALLED = PurePosixPath("usr/share/gimp/2.0/help")
MANUAL = "en"
IMAGES = "images"  # pictures lie in folders below it, the icons of the pages' own furniture right in it
LICENSE = "GFDL-1.2-or-later"
CAPTION = "en"
SECTION = "en-x-section"  # x: BCP 47's subtags for private use


def write_gimp_help(
    directory: Path, *, package_directory: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> int:
    """Put the manual's pictures into `directory/images` and what it says of them into `records.jsonl`; return the
    records.

    `package_directory` holds the package's tree `en` or its .deb file; without it the package client downloads that.
    `records.jsonl`, in the order of the pages, appears last and whole: a directory with it is a complete corpus.
    `progress(done, total)` is called after each page.

    Raises MisuseError where neither a package client nor a usable directory is there.
    """
    scratch = directory / ".unpacked"
    for left in (directory / IMAGES, scratch):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    number = 0
    with record_lines(directory) as write:  # the scratch directory goes before they appear
        try:
            tree = package_tree(
                scratch,
                (PACKAGE,),
                corpus="gimp_help",
                under=INSTALLED,
                parts=(MANUAL,),
                package_directory=package_directory,
            )
            manual = tree / MANUAL
            shutil.copytree(manual / IMAGES, directory / IMAGES, symlinks=True)
            pages = sorted(manual.glob("*.html"))
            for done, path in enumerate(pages, 1):
                for record in _records(parse_page(path.read_bytes()), path.stem):
                    write(record)
                    number += 1
                if progress is not None:
                    progress(done, len(pages))
        finally:
            shutil.rmtree(scratch)
    return number


def _records(page: Page, name: str) -> Iterator[dict[str, Any]]:
    """The lines of a page's pictures: the title of its figure and the words below it, and the section."""
    for number, picture in enumerate(page.pictures, 1):
        if PurePosixPath(picture.address).parent == PurePosixPath(IMAGES):
            continue
        texts = {CAPTION: _caption(page, picture), SECTION: section_of(page, picture)}
        yield {
            "key": f"{name}-{number}",
            "image": picture.address,
            "captions": [{"language": tag, "text": text} for tag, text in texts.items() if text],
            "page": name,
            "license": LICENSE,
        }


def _caption(page: Page, picture: Picture) -> str:
    # DocBook gives the title of a figure to each of its pictures; what tells these apart stands below each, and is the
    # only text in the element that holds the picture.
    below = text_of(page, picture.within)
    return ": ".join(text for text in (" ".join(picture.alt.split()), below) if text)
