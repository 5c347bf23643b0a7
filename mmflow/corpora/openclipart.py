"""A dirty corpus: the Open Clip Art Library as Debian packages it, public domain and full of defects.

Nothing is cleaned here. Symlinks, 600-megapixel drawings, 3-pixel ones, titles shared by a thousand drawings, addresses
and twice-escaped entities stay as they are, for `shard` to find and for its quarantine to count.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from mmflow.core.config import OPERATIONAL, Config
from mmflow.corpora.packages import debian_tree, scratch_directory

PACKAGES = ("openclipart-png", "openclipart-svg")
INSTALLED = PurePosixPath("usr/share/openclipart")
LICENSE = "CC-PDDC"  # the dedication that the packages' copyright file quotes
PUBLIC_DOMAIN = ("", "http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
RESOURCE = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource"


class OpenclipartConfig(Config):
    """A larger and dirty corpus, from two Debian packages: the package client downloads 156 MB."""

    name: Literal["openclipart"]
    """openclipart: 6,900 drawings and 1,221 links to them, with titles, descriptions, keywords and many defects."""
    package_directory: Annotated[str | None, OPERATIONAL] = None
    """Folder with the packages' trees (/usr/share/openclipart) or .deb files, where apt-get cannot download them."""

    def write(self, directory: Path, progress: Callable[[int, int], None]) -> Iterator[dict[str, Any]]:
        """Put the drawings into `png/`, symlinks as symlinks; their records in the order of the paths."""
        with scratch_directory(directory, "png") as scratch:
            tree = debian_tree(
                PACKAGES,
                scratch,
                corpus=self.name,
                under=INSTALLED,
                parts=("png", "svg"),
                package_directory=self.package_directory,
            )
            if tree.is_relative_to(scratch):
                (tree / "png").rename(directory / "png")
            else:
                shutil.copytree(tree / "png", directory / "png", symlinks=True)
            images = sorted(path.relative_to(directory).as_posix() for path in (directory / "png").rglob("*.png"))
            for done, image in enumerate(images, 1):
                yield _record(image, tree / "svg")
                progress(done, len(images))


def _record(image: str, svgs: Path) -> dict[str, Any]:
    """The record of the drawing `png/<folder>/<name>.png`, with its title, description and keywords as captions."""
    stem = PurePosixPath(image).relative_to("png").with_suffix("")
    record: dict[str, Any] = {
        "key": stem.as_posix().replace("/", "-"),
        "image": image,
        "captions": [],
        "classes": {"group": stem.parts[0], "folder": stem.parent.as_posix()},
        "license": LICENSE,
    }
    work = _work(svgs / f"{stem}.svg")
    if work is None:
        return record
    keywords = [text for item in work.findall("{*}subject//{*}li") if (text := "".join(item.itertext())).strip()]
    texts = [_text(work, "title"), _text(work, "description"), ", ".join(keywords)]
    # 8,101 of the 8,121 say English, in eight spellings; the others say another language, or "All".
    language = "en" if _text(work, "language").strip().lower().startswith("en") else "und"
    record["captions"] = [{"language": language, "text": text} for text in texts if text.strip()]
    terms = work.find("{*}license")
    claimed = "" if terms is None else terms.get(RESOURCE, "")
    if claimed not in PUBLIC_DOMAIN:
        record["license"] = claimed
    return record


def _work(svg: Path) -> ElementTree.Element | None:
    """The metadata of an SVG's first work, or None where there is no file or no metadata."""
    try:
        # The metadata comes before the drawing, so most of a file need not be parsed.
        for _, element in ElementTree.iterparse(svg, events=("end",)):
            if isinstance(element, ElementTree.Element) and element.tag.rpartition("}")[2] == "Work":
                return element
    except (OSError, ElementTree.ParseError):
        pass
    return None


def _text(work: ElementTree.Element, name: str) -> str:
    element = work.find("{*}" + name)
    return "" if element is None else "".join(element.itertext())
