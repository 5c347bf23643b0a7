"""The dirty demonstration corpus: the Open Clip Art Library as Debian packages it, public domain and full of defects.

Nothing is cleaned here. Symlinks, 600-megapixel drawings, 3-pixel ones, titles shared by a thousand drawings, addresses
and twice-escaped entities go on as they are: ingest shall find them, and its quarantine shall say what it found.
"""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mmflow.corpora.debian import package_tree
from mmflow.corpora.record_lines import record_lines

PACKAGES = ("openclipart-png", "openclipart-svg")
INSTALLED = PurePosixPath("usr/share/openclipart")
LICENSE = "CC-PDDC"  # the dedication that the packages' copyright file quotes
PUBLIC_DOMAIN = ("", "http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
RESOURCE = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource"


def write_openclipart(
    directory: Path, *, package_directory: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> int:
    """Put the drawings into `directory/png` and what their SVGs say of them into `records.jsonl`; return the records.

    `package_directory` holds the packages' trees `png` and `svg`, or the two .deb files; without it the package client
    downloads them. Symlinks stay symlinks. `records.jsonl`, in the order of the paths, appears last and whole: a
    directory with it is a complete corpus. `progress(done, total)` is called after each record.

    Raises MisuseError where neither a package client nor a usable directory is there.
    """
    scratch = directory / ".unpacked"
    for left in (directory / "png", scratch):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    scratch.mkdir(parents=True)
    with record_lines(directory) as write:  # the scratch directory goes before they appear
        try:
            tree = package_tree(
                scratch,
                PACKAGES,
                corpus="openclipart",
                under=INSTALLED,
                parts=("png", "svg"),
                package_directory=package_directory,
            )
            if tree == package_directory:
                shutil.copytree(tree / "png", directory / "png", symlinks=True)
            else:
                (tree / "png").rename(directory / "png")
            images = sorted(path.relative_to(directory).as_posix() for path in (directory / "png").rglob("*.png"))
            for done, image in enumerate(images, 1):
                write(_record(image, tree / "svg"))
                if progress is not None:
                    progress(done, len(images))
        finally:
            shutil.rmtree(scratch)
    return len(images)


def _record(image: str, svgs: Path) -> dict[str, Any]:
    """The line of the drawing at `png/<folder>/<name>.png`; its captions are the title, description and keywords."""
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
    """What an SVG says of its first work, or None where it is absent or says nothing."""
    try:
        # The metadata stands before the drawing: most of a file need not be parsed.
        for _, element in ElementTree.iterparse(svg, events=("end",)):
            if isinstance(element, ElementTree.Element) and element.tag.rpartition("}")[2] == "Work":
                return element
    except (OSError, ElementTree.ParseError):
        return None
    return None


def _text(work: ElementTree.Element, name: str) -> str:
    element = work.find("{*}" + name)
    return "" if element is None else "".join(element.itertext())
