"""The files that a URI means, on this machine or in an object store: globs, brace ranges, folders with links in a loop.

Every reader of sources opens its files through this module.
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
from braceexpand import braceexpand
from pyarrow import fs

from mmflow.core.errors import MisuseError
from mmflow.core.storage import filesystem, join, local_path, split_query

MAGIC = re.compile(r"[*?[]")
REMOTE_MAGIC = re.compile(r"[*[]")  # in a remote URI a question mark begins the query
BRACES = re.compile(r"\{([^{}]*)\}")
READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """A file or directory that a URI means. `base` is the URI of the directory that its name is relative to."""

    uri: str
    base: str
    is_directory: bool


@dataclass(frozen=True, slots=True)
class File:
    """A file in a directory: its name relative to that, its size in bytes, and `modified` in ns (0 for local files)."""

    name: str
    size: int
    modified: int = 0


# --- patterns -------------------------------------------------------------------------------------------------------


def find(uri: str) -> list[Place]:
    """What a URI means, in order. Raises MisuseError if it, or one of its alternatives in braces, is not there."""
    uri = _normal(uri)
    whole = _place(uri)
    if whole is not None:
        return [whole]
    base = _literal_parent(uri)
    places: dict[str, Place] = {}
    for alternative in expand_braces(uri):
        above = _literal_parent(alternative)
        matches = list(_matches(above, name_below(alternative, above).split("/")))
        if not matches:
            raise MisuseError(f"{alternative}: no such file; correct its path")
        for match in matches:
            places.setdefault(match.uri, Place(match.uri, base, match.is_directory))
    return list(places.values())


def expand_braces(text: str) -> list[str]:
    """The alternatives of {a,b} and {000..127}, in the order written; other braces stay as they are.

    Raises MisuseError for a range that runs backwards, which is a slip more often than it is meant.
    """
    for first, last in re.findall(r"\{(\d+)\.\.(\d+)", text):
        if int(first) > int(last):
            raise MisuseError(f"{text}: the range {{{first}..{last}}} runs backwards; swap its ends")
    try:
        return list(dict.fromkeys(braceexpand(text, escape=False)))
    except ValueError:  # braces that are not balanced
        return [text]


def parent(uri: str) -> str:
    """The URI of the directory above."""
    uri, query = split_query(_normal(uri))
    return (uri.rpartition("/")[0] or "/") + query


def name_below(uri: str, base: str) -> str:
    """The path of `uri` below the directory `base`, with slashes; empty for `base` itself."""
    return split_query(_normal(uri))[0].removeprefix(split_query(_normal(base))[0]).strip("/")


def _normal(uri: str) -> str:
    """A local path made absolute, or a remote URI without a slash at its end."""
    path = local_path(uri)
    if path is not None:
        return os.path.normpath(path)
    base, query = split_query(uri)
    return base.rstrip("/") + query


def _place(uri: str) -> Place | None:
    base, _ = split_query(uri)
    if local_path(uri) is None and (REMOTE_MAGIC.search(base) or BRACES.search(base)):
        return None  # pyarrow does not take it for a URI
    system, path = filesystem(uri)
    info = system.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        return None
    return Place(uri, parent(uri), info.type == fs.FileType.Directory)


def _literal_parent(uri: str) -> str:
    """The URI of the directory above the first part that is a pattern."""
    base, query = split_query(uri)
    magic = (MAGIC if local_path(uri) is not None else REMOTE_MAGIC).search(base)
    starts = [match.start() for match in (magic, BRACES.search(base)) if match]
    return (base[: base.rfind("/", 0, min(starts, default=len(base)))] or "/") + query


def _matches(base: str, parts: Sequence[str]) -> Iterator[Place]:
    """The places below the directory `base` that match the parts of a pattern."""
    head, rest = parts[0], parts[1:]
    if head == "**":
        yield from _matches(base, rest or ["*"])
        for name, is_directory, is_link in _entries(base):
            if is_directory and not is_link and not name.startswith("."):
                yield from _matches(join(base, name), parts)
        return
    if MAGIC.search(head):
        shows_hidden = head.startswith(".")
        names = [
            (name, is_directory)
            for name, is_directory, _ in _entries(base)
            if fnmatch.fnmatchcase(name, head) and (shows_hidden or not name.startswith("."))
        ]
    else:
        place = _place(join(base, head))
        names = [(head, place.is_directory)] if place else []
    for name, is_directory in names:
        if not rest:
            yield Place(join(base, name), base, is_directory)
        elif is_directory:
            yield from _matches(join(base, name), rest)


def _entries(uri: str) -> list[tuple[str, bool, bool]]:
    """(name, is a directory, is a link) of each entry of a directory, sorted; empty if there is no directory."""
    system, path = filesystem(uri)
    local = local_path(uri) is not None
    return sorted(
        (info.base_name, info.type == fs.FileType.Directory, local and os.path.islink(info.path))
        for info in system.get_file_info(fs.FileSelector(path, allow_not_found=True))
    )


# --- folders --------------------------------------------------------------------------------------------------------


def walk(uri: str) -> list[File]:
    """The files under a directory, sorted by name, without hidden ones.

    A directory that is reached twice, through symbolic links, is walked once, under its own name if it has one here.
    Raises MisuseError for a directory that cannot be listed.
    """
    path = local_path(uri)
    files = list(_walk_local(str(path))) if path is not None else list(_walk_remote(uri))
    return sorted(files, key=lambda file: file.name.split("/"))


def _walk_remote(uri: str) -> Iterator[File]:
    system, path = filesystem(uri)
    prefix = path.rstrip("/") + "/"
    for info in system.get_file_info(fs.FileSelector(path, recursive=True)):
        name = info.path.removeprefix(prefix)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            yield File(name, info.size, info.mtime_ns or 0)


def _walk_local(top: str) -> Iterator[File]:
    """Links to directories are followed last, so that a directory with a name of its own here keeps it."""
    waiting, linked = [""], list[str]()
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
            raise MisuseError(f"{path}: the folder cannot be listed ({error.strerror}); fix or remove it") from error
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
    except OSError:  # a link to nothing: a record with its image missing
        return 0


# --- files ----------------------------------------------------------------------------------------------------------


def open_file(root: str, name: str) -> Any:
    """A pyarrow file with random access. Raises OSError."""
    system, path = filesystem(root)
    return system.open_input_file(f"{path.rstrip('/')}/{name}")


def open_stream(root: str, name: str) -> IO[bytes]:
    """A buffered stream of the file's bytes. Raises OSError."""
    system, path = filesystem(root)
    return io.BufferedReader(system.open_input_stream(f"{path.rstrip('/')}/{name}"), READ_BYTES)


def fingerprint(root: str, names: Sequence[str]) -> str:
    """xxh3_128 (hex) of the files' content; in an object store, of their names, sizes and times."""
    return fingerprint_and_lines(root, names)[0]


def fingerprint_and_lines(root: str, names: Sequence[str]) -> tuple[str, int]:
    """`fingerprint`, and how many lines the files have, which costs nothing more; 0 if they were not read."""
    digest, lines = xxhash.xxh3_128(), 0
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
        except OSError as error:  # a missing or unreadable file of a list; its reader reports it
            digest.update(f"{name}\0{error.errno}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest(), lines


# In the order in which the image of a sample is looked for. Some of these cannot be decoded here: their records are
# rejected with the reason, where leaving them out would be silence.
IMAGE_EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "ppm", "pgm"),
    *("jfif", "jpe", "heic", "heif", "svg", "ico", "psd"),
)


def extension(name: str) -> str:
    """The part of a file name after its last dot, in lower case; empty if there is none."""
    _, dot, ending = name.rpartition("/")[2].rpartition(".")
    return ending.lower() if dot else ""


def is_image(name: str) -> bool:
    """Whether a file name has an extension of an image."""
    return extension(name) in IMAGE_EXTENSIONS
