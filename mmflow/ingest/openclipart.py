"""The dirty demonstration corpus: the Open Clip Art Library as Debian packages it, public domain and full of defects.

Nothing is cleaned here. Symlinks, 600-megapixel drawings, 3-pixel ones, titles shared by a thousand drawings, addresses
and twice-escaped entities go on as they are: ingest shall find them, and its quarantine shall say what it found.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pyarrow as pa

from mmflow.errors import MisuseError

PACKAGES = ("openclipart-png", "openclipart-svg")
INSTALLED = PurePosixPath("usr/share/openclipart")
LICENSE = "CC-PDDC"  # the dedication that the packages' copyright file quotes
PUBLIC_DOMAIN = ("", "http://web.resource.org/cc/PublicDomain", "http://creativecommons.org/licenses/publicdomain/")
RESOURCE = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}resource"
AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


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
    try:
        tree = _tree(scratch, package_directory)
        if tree == package_directory:
            shutil.copytree(tree / "png", directory / "png", symlinks=True)
        else:
            (tree / "png").rename(directory / "png")
        images = sorted(path.relative_to(directory).as_posix() for path in (directory / "png").rglob("*.png"))
        staged = directory / "records.jsonl.staged"
        with staged.open("w", encoding="utf-8") as lines:
            for done, image in enumerate(images, 1):
                lines.write(json.dumps(_record(image, tree / "svg"), ensure_ascii=False, sort_keys=True) + "\n")
                if progress is not None:
                    progress(done, len(images))
    finally:
        shutil.rmtree(scratch)
    staged.replace(directory / "records.jsonl")
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


# --- the packages -----------------------------------------------------------------------------------------------------


def _tree(scratch: Path, package_directory: Path | None) -> Path:
    """The directory with the trees `png` and `svg`: the one given, or one unpacked into `scratch`."""
    if package_directory is not None and _is_tree(package_directory):
        return package_directory
    if package_directory is None:
        _download(scratch)
    packages = package_directory or scratch
    for name in PACKAGES:
        found = sorted(packages.glob(f"{name}_*.deb"))
        if not found:
            raise MisuseError(
                f"{packages}: neither the trees png and svg nor {name}_*.deb; "
                "give corpus.package_directory the packages' /usr/share/openclipart or their two .deb files"
            )
        _unpack(found[-1], scratch)
    if not _is_tree(scratch / INSTALLED):
        raise MisuseError(f"{packages}: the packages lack {INSTALLED}/png or svg; download them again")
    return scratch / INSTALLED


def _is_tree(directory: Path) -> bool:
    return all((directory / name).is_dir() for name in ("png", "svg"))


def _download(directory: Path) -> None:
    """Fetch the packages with the system's own client, from wherever it is set up to fetch them."""
    try:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=directory, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise MisuseError(
            "corpus openclipart comes through apt-get, which this machine lacks; bring the Debian packages "
            f"{' and '.join(PACKAGES)} here and name their folder as corpus.package_directory"
        ) from None
    except subprocess.CalledProcessError as error:
        complaints = [line for line in error.stderr.splitlines() if line.startswith("E:")] or error.stderr.splitlines()
        raise MisuseError(
            f"apt-get download {' '.join(PACKAGES)}: {complaints[0] if complaints else 'failed'}; run `apt-get update`"
            " first, or name a folder with the packages as corpus.package_directory"
        ) from error


def _unpack(package: Path, directory: Path) -> None:
    """Unpack what a .deb has below usr/share/openclipart, by Python alone: dpkg is absent where Debian is."""
    try:
        with package.open("rb") as file:
            for name in _ar_members(file):
                if name.startswith("data.tar"):
                    _unpack_tar(file, name, directory)
                    return
    except (OSError, EOFError, tarfile.TarError, pa.ArrowException) as error:
        raise MisuseError(f"{package}: a damaged package ({error}); download it again") from error
    raise MisuseError(f"{package}: not a Debian package, it has no data.tar; download it again")


def _unpack_tar(file: IO[bytes], name: str, directory: Path) -> None:
    # Ubuntu's packages are zstd, which Python 3.11 cannot read; tarfile finds out by itself what else it is.
    stream = pa.CompressedInputStream(file, "zstd") if name.endswith(".zst") else file
    with tarfile.open(fileobj=stream, mode="r|" if name.endswith(".zst") else "r|*") as tar:
        for member in tar:
            if PurePosixPath(member.name).is_relative_to(INSTALLED):
                tar.extract(member, directory, filter="data")


def _ar_members(file: IO[bytes]) -> Iterator[str]:
    """The names of an ar archive's members; at each, the file stands at the member's first byte."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        return
    position = len(AR_MAGIC)
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
        size = int(header[48:58])
        position += AR_HEADER_BYTES
        if position + size > end:  # tarfile would take a stream that is cut between two members for a whole one
            raise EOFError(f"cut short at byte {end}")
        yield header[:16].decode("ascii", "replace").rstrip(" /")
        position += size + size % 2  # a member begins at an even byte
        file.seek(position)
