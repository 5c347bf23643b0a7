"""One commit protocol for every artifact, so that every job is idempotent, resumable and safe to submit twice.

An artifact is a directory named by the identity of its stage. Its files are published one by one, each whole or absent;
`manifest.json` is published last. A directory without a manifest is unfinished work that a rerun continues.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mmflow.core.errors import BusyArtifactError, CorruptArtifactError, MissingArtifactError, MisuseError
from mmflow.core.memory import watch_memory
from mmflow.core.storage import exists, join, local_path, read_json, write_json

MANIFEST = "manifest.json"
BUILD = "build.json"  # what the build cost; not in the manifest, which is the same for the same input
FORMAT_VERSION = 1

# Made once: for a short text, making an encoder takes longer than encoding.
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no white space, no needless escapes."""
    return _CANONICAL.encode(value)


def content_hash(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form: key order and white space do not matter."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A committed artifact: its URI, its manifest, and whether this call built it."""

    uri: str
    manifest: Mapping[str, Any]
    built: bool = False

    @property
    def fingerprint(self) -> str:
        """The hash of its content; the stages downstream depend on it."""
        return str(self.manifest["fingerprint"])

    @property
    def build(self) -> Mapping[str, Any]:
        """What the build cost: `started` (seconds since 1970), `seconds`, `peak_memory_bytes`."""
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
    """Publish the manifest, last and atomically: from here on the artifact exists. It must have a `fingerprint`."""
    complete = {"format": FORMAT_VERSION, "kind": kind, **manifest}
    write_json(join(uri, MANIFEST), complete)
    return Artifact(uri, complete, built=True)


@contextlib.contextmanager
def exclusive(uri: str) -> Iterator[None]:
    """Lock a local artifact directory for this process. Raises BusyArtifactError while another live process holds it.

    The lock is flock's, which ends with its process: kill -9 leaves nothing to clean up. An object store has no locks
    and is correct without: two builders there write the same bytes and waste only time.
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

    `build` writes into the directory it is given and returns the manifest's fields, `fingerprint` among them. It may
    find the files of a killed run there, and continues from them.
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
        """16 hex digits: the same for the same settings, inputs and code version, in any workspace."""
        parts = {"stage": self.name, "version": self.version, "settings": self.settings, "inputs": self.inputs}
        return content_hash(parts)[:16]

    def directory(self, workspace: str) -> str:
        """The artifact's URI in a workspace."""
        return join(workspace, self.name, self.identity)

    def run(self, workspace: str) -> Artifact:
        """The committed artifact, built now if it was not there."""
        uri = self.directory(workspace)
        artifact = self.committed(workspace)
        if artifact is None:
            with exclusive(uri):
                artifact = self.committed(workspace) or self._build(uri)  # another process may just have committed it
        if self.tidy is not None:  # also on a rerun: a kill may have come between commit and tidy
            self.tidy(uri)
        return artifact

    def committed(self, workspace: str) -> Artifact | None:
        """The artifact if it is there."""
        uri = self.directory(workspace)
        return read_artifact(uri, self.kind) if exists(join(uri, MANIFEST)) else None

    def _build(self, uri: str) -> Artifact:
        started = time.time()
        with watch_memory() as peak:
            fields = {"identity": self.identity, "inputs": dict(self.inputs), **self.build(uri)}
        seconds = round(time.time() - started, 3)
        write_json(join(uri, BUILD), {"started": started, "seconds": seconds, "peak_memory_bytes": peak()})
        return commit(uri, self.kind, fields)
