"""A corpus of long texts: GIMP's manual as Debian packages it. A picture has a caption and the section around it.

The two texts carry language tags of their own, so that a recipe can weigh them in training and examine each alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any, Literal

from mmflow.core.config import OPERATIONAL, Config
from mmflow.corpora.packages import debian_tree, scratch_directory

if TYPE_CHECKING:
    from mmflow.sources.html import Page

PACKAGES = ("gimp-help-en",)
INSTALLED = PurePosixPath("usr/share/gimp/2.0/help")
MANUAL = "en"
IMAGES = "images"  # has the pictures in its folders, and the icons of the pages' navigation right in it
CAPTION = "en"
SECTION = "en-x-section"  # x: BCP 47's subtags for private use


class GimpHelpConfig(Config):
    """Long texts: a manual's pictures, from a Debian package: the package client downloads 50 MB."""

    name: Literal["gimp_help"]
    """gimp_help: GIMP's manual in English. A picture has a caption, tagged en, and the section around it, tagged
    en-x-section; the metadata's `page` says which pictures share text."""
    package_directory: Annotated[str | None, OPERATIONAL] = None
    """Folder with the package's tree (/usr/share/gimp/2.0/help) or its .deb file, where apt-get cannot download it."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        """Put the manual's pictures into `images/`; their records in the order of the pages, which are counted."""
        from mmflow.sources.html import parse_page

        with scratch_directory(directory, IMAGES) as scratch:
            tree = debian_tree(
                PACKAGES,
                scratch,
                corpus=self.name,
                under=INSTALLED,
                parts=(MANUAL,),
                package_directory=self.package_directory,
            )
            shutil.copytree(tree / MANUAL / IMAGES, directory / IMAGES, symlinks=True)
            pages = sorted((tree / MANUAL).glob("*.html"))
            for done, path in enumerate(pages, 1):
                yield from _records(parse_page(path.read_bytes()), path.stem)
                progress(done, len(pages))


def _records(page: Page, name: str) -> Iterator[dict[str, Any]]:
    """The records of a page's pictures. The caption is the title of the figure and the words below the picture."""
    from mmflow.sources.html import section_of, text_of

    for number, picture in enumerate(page.pictures, 1):
        if PurePosixPath(picture.address).parent == PurePosixPath(IMAGES):
            continue
        # DocBook gives all pictures of a figure its title. What distinguishes them is below each picture: the only
        # text in the element around it.
        captions = (" ".join(picture.alt.split()), text_of(page, picture.within))
        texts = {CAPTION: ": ".join(filter(None, captions)), SECTION: section_of(page, picture)}
        yield {
            "key": f"{name}-{number}",
            "image": picture.address,
            "captions": [{"language": tag, "text": text} for tag, text in texts.items() if text],
            "page": name,
            "license": "GFDL-1.2-or-later",
        }
