"""Files by URI, on a local disk or in an object store: paths, whole reads and atomic writes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmflow.core.errors import CorruptArtifactError, MissingArtifactError, MisuseError

if TYPE_CHECKING:
    import pyarrow.fs

COPY_BYTES = 8 << 20


def local_path(uri: str) -> Path | None:
    """The absolute path of a `file:` URI or plain path; None for a remote URI."""
    if uri.startswith("file:"):
        uri = uri.removeprefix("file://").removeprefix("file:")
    return None if "://" in uri else Path(uri).expanduser().absolute()


def join(uri: str, *parts: str) -> str:
    """`uri/part/…`; the query that an s3:// URI may carry stays at the end."""
    base, query = split_query(uri)
    return "/".join([base.rstrip("/"), *parts]) + query


def suffixed(uri: str, suffix: str) -> str:
    """The URI with a suffix on its file name."""
    base, query = split_query(uri)
    return base + suffix + query


def split_query(uri: str) -> tuple[str, str]:
    """A URI without its query, and the query with its question mark. In a local path a question mark is a letter."""
    if local_path(uri) is not None:
        return uri, ""
    base, mark, query = uri.partition("?")
    return base, mark + query


def scratch_directory(uri: str) -> Path:
    """The folder on this machine for temporary files that belong to a URI. The same URI has the same folder, so the
    files of a killed process are found and removed by the next one."""
    return Path(tempfile.gettempdir()) / f"mmflow-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a URI (local, s3://, gs://) and the path within it."""
    import pyarrow
    from pyarrow import fs

    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), str(path)
    try:
        system: tuple[pyarrow.fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise MisuseError(f"{uri}: not a storage URI ({error}); use a path, s3:// or gs://") from error
    return system


def exists(uri: str) -> bool:
    """Whether the URI is an existing file or directory."""
    from pyarrow import fs

    system, path = filesystem(uri)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


@contextlib.contextmanager
def _must_exist(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises MissingArtifactError if there is none."""
    system, path = filesystem(uri)
    with _must_exist(uri), system.open_input_stream(path) as stream:
        return bytes(stream.read())


def positioned_reader(uri: str) -> Callable[[int, int], bytes]:
    """A thread-safe function (size, offset) → bytes. The file stays open for as long as the function lives.

    Raises MissingArtifactError if there is no such file.
    """
    path = local_path(uri)
    with _must_exist(uri):
        if path is None:
            system, remote = filesystem(uri)
            stream = system.open_input_file(remote)
            return lambda size, offset: bytes(stream.read_at(size, offset))
        file = open(path, "rb", buffering=0)  # noqa: SIM115 — the closure keeps it
    return lambda size, offset: os.pread(file.fileno(), size, offset)


def file_sha256(uri: str) -> str:
    """sha256 (hex) of a file's bytes. Raises MissingArtifactError if there is no such file."""
    system, path = filesystem(uri)
    digest = hashlib.sha256()
    with _must_exist(uri), system.open_input_stream(path) as stream:
        while block := stream.read(COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def publish(uri: str) -> Iterator[IO[bytes]]:
    """A binary file to write. `uri` appears whole when the block ends, and not at all if it raises.

    On a local disk the data goes to a staging file in the same folder, which is fsynced and renamed; then the folder is
    fsynced. So neither a killed process nor a power cut leaves half a file under the final name. An object store shows
    an object only after a complete upload, so there the staging file is uploaded in one go.
    """
    path = local_path(uri)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, staging = tempfile.mkstemp(prefix=".staging-", dir=path.parent if path is not None else None)
    try:
        with os.fdopen(descriptor, "w+b") as stream:
            yield stream
            stream.flush()
            if path is not None:
                os.fsync(stream.fileno())
            else:
                stream.seek(0)
                system, remote = filesystem(uri)
                with system.open_output_stream(remote) as target:
                    shutil.copyfileobj(stream, target, COPY_BYTES)
        if path is not None:
            os.chmod(staging, 0o644)  # mkstemp's 0600 would lock out colleagues who share the workspace
            os.replace(staging, path)
            fsync_directory(path.parent)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(staging)


def fsync_directory(path: Path) -> None:
    """Make renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(uri: str, data: bytes) -> None:
    """Publish `data` as `uri`, whole or not at all."""
    with publish(uri) as stream:
        stream.write(data)


def write_json(uri: str, value: Any) -> None:
    """Publish a JSON file that people can read and diff."""
    write_bytes(uri, (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(uri: str) -> Any:
    """The value of a JSON file. Raises CorruptArtifactError if it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise CorruptArtifactError(f"{uri}: not valid JSON ({error})") from error
