"""Which files a URI means, on this machine or in an object store: globs, brace ranges, and folders with loops in them.

Every reader of sources opens its files through here.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import xxhash
from pyarrow import fs

from mmflow.core.errors import MisuseError
from mmflow.core.storage import filesystem, local_path

MAGIC = re.compile(r"[*?[]")
REMOTE_MAGIC = re.compile(r"[*[]")  # there a question mark begins the query
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
READ_BYTES = 1 << 20
# In the order in which the image of a sample is looked for. Some of these cannot be decoded here: their records are
# rejected with the reason, where leaving them out would be silence.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"),
    *("jfif", "jpe", "heic", "heif", "svg", "ico", "psd"),
)


@dataclass(frozen=True, slots=True)
class Place:
    """A file or directory that a URI means. `base` is the URI of the directory that its name counts from."""

    uri: str
    base: str
    is_directory: bool


@dataclass(frozen=True, slots=True)
class File:
    """A file in a directory: its name relative to that, with slashes; `modified` in ns, 0 on this machine."""

    name: str
    size: int
    modified: int = 0


def find(uri: str) -> list[Place]:
    """What a URI means, in order. Raises MisuseError where it, or one of its alternatives in braces, is not there."""
    uri, query = _without_query(uri)
    whole = _place(uri, query)
    if whole is not None:
        return [whole]
    found: dict[str, Place] = {}
    alternatives = expand_braces(uri)
    base = _literal_parent(uri).rstrip("/") or "/"
    for alternative in alternatives:
        matches = list(_glob(alternative, query))
        if not matches:
            raise MisuseError(f"{alternative}: no such file; it is named in `sources`")
        for match in matches:
            found.setdefault(match.uri, Place(match.uri, base + query, match.is_directory))
    return list(found.values())


def expand_braces(text: str) -> list[str]:
    """The alternatives of {a,b} and {000..127}, in the order written; braces of neither kind stay as they are.

    Raises MisuseError for a range that runs backwards.
    """
    for match in BRACES.finditer(text):
        inner = match[1]
        if bounds := RANGE.fullmatch(inner):
            first, last = int(bounds[1]), int(bounds[2])
            if last < first:
                raise MisuseError(f"{text}: the range {{{inner}}} runs backwards")
            width = len(bounds[1]) if bounds[1].startswith("0") else 0
            values = [f"{number:0{width}d}" for number in range(first, last + 1)]
        elif "," in inner:
            values = inner.split(",")
        else:
            continue
        head, tail = text[: match.start()], text[match.end() :]
        return list(dict.fromkeys(each for value in values for each in expand_braces(f"{head}{value}{tail}")))
    return [text]


def walk(uri: str) -> list[File]:
    """The files under a directory, in the order of their names; hidden ones are left out, as by every shell.

    A directory that is reached twice, by symbolic links, is walked once, under its own name if it has one here. Raises
    MisuseError for a directory that cannot be listed.
    """
    path = local_path(uri)
    files = list(_walk_local(str(path))) if path is not None else list(_walk_remote(uri))
    return sorted(files, key=lambda file: file.name.split("/"))


def open_file(root: str, name: str) -> Any:
    """A pyarrow file to read anywhere in. Raises OSError."""
    system, path = filesystem(root)
    return system.open_input_file(f"{path.rstrip('/')}/{name}")


def open_stream(root: str, name: str) -> IO[bytes]:
    """A buffered stream of the file's bytes, from the first on. Raises OSError."""
    system, path = filesystem(root)
    return io.BufferedReader(system.open_input_stream(f"{path.rstrip('/')}/{name}"), READ_BYTES)


def fingerprint(root: str, names: Sequence[str]) -> str:
    """xxh3_128 (hex) of the files' content; in an object store, of their names, sizes and times. Raises OSError."""
    return fingerprint_and_lines(root, names)[0]


def fingerprint_and_lines(root: str, names: Sequence[str]) -> tuple[str, int]:
    """`fingerprint`, and how many lines the files have, which costs nothing more; 0 where they were not read."""
    digest = xxhash.xxh3_128()
    lines = 0
    remote = local_path(root) is None
    system, path = filesystem(root)
    for name in names:
        if remote:
            info = system.get_file_info(f"{path.rstrip('/')}/{name}")
            digest.update(f"{name}\0{info.size}\0{info.mtime_ns}\0".encode("utf-8", "surrogateescape"))
            continue
        try:
            with open_stream(root, name) as stream:
                while block := stream.read(READ_BYTES):
                    digest.update(block)
                    lines += block.count(b"\n")
        except OSError as error:  # named in a list and not there, or not for us: its reader says so
            digest.update(f"{name}\0{error.errno}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), lines


def parent(uri: str) -> str:
    """The URI of the directory above."""
    uri, query = _without_query(uri)
    above = uri.rstrip("/").rpartition("/")[0]
    return (above or "/") + query


def name_below(uri: str, base: str) -> str:
    """The path of `uri` below the directory `base`, with slashes; empty for `base` itself."""
    uri, base = _without_query(uri)[0].rstrip("/"), _without_query(base)[0].rstrip("/")
    return uri.removeprefix(base).strip("/")


def _without_query(uri: str) -> tuple[str, str]:
    """A local path made absolute, or a remote URI and its query with the question mark."""
    path = local_path(uri)
    if path is not None:
        return os.path.normpath(path), ""
    base, mark, query = uri.partition("?")
    return base.rstrip("/"), mark + query


def _place(uri: str, query: str) -> Place | None:
    if local_path(uri) is None and (REMOTE_MAGIC.search(uri) or BRACES.search(uri)):
        return None  # no URI to pyarrow
    system, path = filesystem(uri + query)
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        return None
    return Place(uri + query, parent(uri + query), info.type == fs.FileType.Directory)


def _literal_parent(uri: str) -> str:
    """The directory, with its slash, above the first part that is a pattern; that of a name without any."""
    magic = (MAGIC if local_path(uri) is not None else REMOTE_MAGIC).search(uri)
    braces = BRACES.search(uri)
    end = min(match.start() if match else len(uri) for match in (magic, braces))
    return uri[: uri.rfind("/", 0, end) + 1]


def _glob(uri: str, query: str) -> Iterator[Place]:
    base = _literal_parent(uri).rstrip("/") or "/"
    parts = uri[len(base) :].strip("/").split("/")
    yield from _match(base, query, parts)


def _match(base: str, query: str, parts: Sequence[str]) -> Iterator[Place]:
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _match(base, query, rest or ["*"])
        for name, is_directory, is_link in _entries(base + query):
            if is_directory and not is_link and not name.startswith("."):
                yield from _match(f"{base.rstrip('/')}/{name}", query, parts)
        return
    if MAGIC.search(head):
        entries = _entries(base + query)
        hidden = head.startswith(".")
        names = [
            (name, is_directory)
            for name, is_directory, _ in entries
            if fnmatch.fnmatchcase(name, head) and (hidden or not name.startswith("."))
        ]
    else:
        there = _place(f"{base.rstrip('/')}/{head}", query)
        names = [(head, there.is_directory)] if there else []
    for name, is_directory in names:
        uri = f"{base.rstrip('/')}/{name}"
        if not rest:
            yield Place(uri + query, base + query, is_directory)
        elif is_directory:
            yield from _match(uri, query, rest)


def _entries(uri: str) -> list[tuple[str, bool, bool]]:
    """(name, whether a directory, whether a link) of what a directory holds, sorted; nothing where there is none."""
    system, path = filesystem(uri)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    local = local_path(uri) is not None
    return sorted(
        (info.base_name, info.type == fs.FileType.Directory, local and os.path.islink(info.path)) for info in found
    )


def _walk_remote(uri: str) -> Iterator[File]:
    system, path = filesystem(uri)
    prefix = path.rstrip("/") + "/"
    for info in system.get_file_info(fs.FileSelector(path, recursive=True)):
        name = info.path.removeprefix(prefix)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield File(name, info.size, info.mtime_ns or 0)


def _walk_local(top: str) -> Iterator[File]:
    """Links to directories are followed after everything else, so that what has a name of its own here keeps it."""
    waiting = [""]
    linked: list[str] = []
    visited: set[tuple[int, int]] = set()
    while waiting or linked:
        folder = waiting.pop() if waiting else linked.pop(0)
        path = os.path.join(top, folder)
        try:
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(path) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            raise MisuseError(f"{path}: the folder cannot be listed ({error.strerror}); mend or remove it") from error
        for entry in inside:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_directory(entry):
                (linked if entry.is_symlink() else waiting).append(name)
            else:
                yield File(name, _size(entry))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing is a record whose image is missing
        return 0


def extension(name: str) -> str:
    """What stands behind the last dot of a file's name, in lower case; empty where there is none."""
    return name.rpartition("/")[2].rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def is_image(name: str) -> bool:
    """Whether a file's name ends as those of images do."""
    return extension(name) in IMAGE_EXTENSIONS
