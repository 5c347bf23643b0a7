"""One commit protocol for every artifact, so that every job is idempotent, resumable and safe to submit twice.

An artifact is a directory named by the identity of what made it. Its files are published one by one, each whole or
absent; `manifest.json` is published last. A directory without a manifest is work in progress that a rerun goes on with.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mmflow.core.errors import BusyArtifactError, CorruptArtifactError, MissingArtifactError, MisuseError

if TYPE_CHECKING:
    import pyarrow.fs

MANIFEST = "manifest.json"
BUILD = "build.json"  # how long and when: kept out of the manifest, which is the same for the same input
FORMAT_VERSION = 1
COPY_BYTES = 8 << 20


# --- storage URIs ---------------------------------------------------------------------------------------------------


def local_path(uri: str) -> Path | None:
    """The path of a `file:` URI or plain path, made absolute; None for a remote URI."""
    if uri.startswith("file:"):
        uri = uri.removeprefix("file://").removeprefix("file:")
    return None if "://" in uri else Path(uri).expanduser().absolute()


def join(uri: str, *parts: str) -> str:
    """`uri/part/…`, keeping the query that an s3:// URI may carry at its end."""
    base, options = _without_options(uri)
    return "/".join([base.rstrip("/"), *parts]) + options


def suffixed(uri: str, suffix: str) -> str:
    """The URI of a file beside another: its name and a suffix."""
    base, options = _without_options(uri)
    return base + suffix + options


def _without_options(uri: str) -> tuple[str, str]:
    """A URI in two: what it names, and its query."""
    base, query, options = uri.partition("?") if local_path(uri) is None else (uri, "", "")
    return base, query + options


def filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a URI (local, s3://, gs://) and the path within it."""
    import pyarrow
    from pyarrow import fs

    path = local_path(uri)
    if path is not None:
        return fs.LocalFileSystem(), str(path)
    try:
        found: tuple[pyarrow.fs.FileSystem, str] = fs.FileSystem.from_uri(uri)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise MisuseError(f"{uri}: not a storage URI ({error}); use a path, s3:// or gs://") from error
    return found


def exists(uri: str) -> bool:
    """Whether a file or directory is there."""
    from pyarrow import fs

    system, path = filesystem(uri)
    return bool(system.get_file_info(path).type != fs.FileType.NotFound)


def read_bytes(uri: str) -> bytes:
    """The whole file. Raises MissingArtifactError where there is none."""
    system, path = filesystem(uri)
    try:
        with system.open_input_stream(path) as stream:
            return bytes(stream.read())
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error


def positioned_reader(uri: str) -> Callable[[int, int], bytes]:
    """(size, offset) → bytes of a file that stays open for as long as the function lives; safe between threads.

    Raises MissingArtifactError where there is no such file.
    """
    path = local_path(uri)
    try:
        if path is None:
            system, remote = filesystem(uri)
            stream = system.open_input_file(remote)
            return lambda size, offset: bytes(stream.read_at(size, offset))
        file = open(path, "rb", buffering=0)  # noqa: SIM115 — the closure keeps it
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error
    return lambda size, offset: os.pread(file.fileno(), size, offset)


@contextlib.contextmanager
def publish(uri: str) -> Iterator[IO[bytes]]:
    """A binary file to write; `uri` appears whole when the block ends, and not at all when it raises.

    Locally a staging file beside the target is fsynced and renamed over it, and the directory is fsynced, so that
    neither a killed process nor a power cut leaves half a file under the final name. An object store shows an object
    only when its upload is complete, so there the local staging file is uploaded in one go.
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
            os.chmod(staging, 0o644)  # mkstemp's 0600 would lock out the colleagues who share a workspace
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
    """The value of a JSON file. Raises CorruptArtifactError where it is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise CorruptArtifactError(f"{uri}: not valid JSON ({error})") from error


# --- hashes ---------------------------------------------------------------------------------------------------------


# Made once: a sample's texts take less time than an encoder's making.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: keys sorted, no white space, no escapes that UTF-8 does without."""
    return _CANONICAL.encode(value)


def scratch_directory(uri: str) -> Path:
    """Where on this machine may lie for a while what belongs to a URI elsewhere: always the same place, so that kills
    leave nothing that nobody removes."""
    return Path(tempfile.gettempdir()) / f"mmflow-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form: key order and white space do not matter."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def file_sha256(uri: str) -> str:
    """sha256 (hex) of a file's bytes."""
    system, path = filesystem(uri)
    digest = hashlib.sha256()
    try:
        with system.open_input_stream(path) as stream:
            while block := stream.read(COPY_BYTES):
                digest.update(block)
    except FileNotFoundError as error:
        raise MissingArtifactError(f"{uri}: no such file") from error
    return digest.hexdigest()


# --- artifacts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: where it lies, its manifest, and whether this call built it."""

    uri: str
    manifest: Mapping[str, Any]
    built: bool = False

    @property
    def fingerprint(self) -> str:
        """The hash of its content, which is what stages downstream depend on."""
        return str(self.manifest["fingerprint"])

    @property
    def build(self) -> Mapping[str, Any]:
        """When it was built and in how many seconds."""
        build: Mapping[str, Any] = read_json(join(self.uri, BUILD))
        return build

    def file(self, *parts: str) -> str:
        """The URI of one of its files."""
        return join(self.uri, *parts)


def read_artifact(uri: str, kind: str | None = None) -> Artifact:
    """The committed artifact at `uri`. Raises MissingArtifactError without a manifest, MisuseError for another kind."""
    if not exists(join(uri, MANIFEST)):
        raise MissingArtifactError(f"{uri}: no {MANIFEST}, so nothing was committed here; run the stage that makes it")
    manifest = read_json(join(uri, MANIFEST))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT_VERSION:
        raise CorruptArtifactError(f"{uri}: {MANIFEST} is not of format {FORMAT_VERSION}; was it written by mmflow?")
    if kind is not None and manifest.get("kind") != kind:
        raise MisuseError(f"{uri}: this is a {manifest.get('kind')}, a {kind} is needed")
    return Artifact(uri, manifest)


def commit(uri: str, kind: str, manifest: Mapping[str, Any]) -> Artifact:
    """Publish the manifest, last and atomically: from here on the artifact exists. It must carry `fingerprint`."""
    whole = {"format": FORMAT_VERSION, "kind": kind, **manifest}
    write_json(join(uri, MANIFEST), whole)
    return Artifact(uri, whole, built=True)


@contextlib.contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Hold a local artifact directory for this process. Raises BusyArtifactError while another live process holds it.

    The lock is flock's, which dies with its process: kill -9 leaves nothing to clean up. An object store has none, and
    needs none to be correct: two builders there write the same bytes, and waste only time.
    """
    path = local_path(uri)
    if path is None:
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise BusyArtifactError(f"{uri}: {holder} is building this; wait for it or stop it") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A function from settings and input artifacts to one output artifact, run at most once for each identity.

    `build` writes into the directory that it is given and returns the manifest's fields, `fingerprint` among them. It
    may find there what a killed run left, and goes on from it.
    """

    name: str
    kind: str
    version: int  # raise it when the same settings come to mean another output
    settings: Mapping[str, Any]
    inputs: Mapping[str, str] = field(default_factory=dict)  # name → fingerprint, never a path
    build: Callable[[str], Mapping[str, Any]] = field(compare=False)
    tidy: Callable[[str], None] | None = field(default=None, compare=False)  # removes what only the build needed

    @cached_property
    def identity(self) -> str:
        """16 hex digits: the same for the same settings, inputs and code version, wherever the workspace lies."""
        parts = {"stage": self.name, "version": self.version, "settings": self.settings, "inputs": self.inputs}
        return content_hash(parts)[:16]

    def directory(self, workspace: str) -> str:
        """Where the artifact lies in a workspace."""
        return join(workspace, self.name, self.identity)

    def run(self, workspace: str) -> Artifact:
        """The committed artifact, built now if it was not there."""
        uri = self.directory(workspace)
        artifact = self._found(uri)
        if artifact is None:
            with exclusive(uri):
                artifact = self._found(uri) or self._build(uri)  # committed between the look and the lock
        if self.tidy is not None:  # after the commit, and again where a kill came between the two
            self.tidy(uri)
        return artifact

    def _found(self, uri: str) -> Artifact | None:
        return read_artifact(uri, self.kind) if exists(join(uri, MANIFEST)) else None

    def _build(self, uri: str) -> Artifact:
        started = time.time()
        fields = {"identity": self.identity, "inputs": dict(self.inputs), **self.build(uri)}
        write_json(join(uri, BUILD), {"started": started, "seconds": round(time.time() - started, 3)})
        return commit(uri, self.kind, fields)
