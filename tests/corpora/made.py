"""Writes corpora, and the packages they are read from: .deb files and archives like those of `npm pack`."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pydantic import TypeAdapter

from mmflow.corpora import CorpusConfig, emoji_packages, write_corpus
from mmflow.corpora.emoji_packages import ANIMATIONS, STYLES
from mmflow.corpora.packages import NpmPackage
from tests.imaging.picture_files import clip_of, file_of, reds


def written(directory: Path, name: str, *, num_steps: int | None = None, **settings: Any) -> list[dict[str, Any]]:
    """Write a corpus with these settings and return its records. Its progress must count `num_steps` steps."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    corpus = TypeAdapter(CorpusConfig).validate_python({"name": name, **settings})
    steps: list[tuple[int, int]] = []
    write_corpus(directory, corpus, lambda done, total: steps.append((done, total)))
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    total = len(lines) if num_steps is None else num_steps
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert len(list(directory.iterdir())) == 2  # the images and the records
    return [json.loads(line) for line in lines]


def write_files(directory: Path, files: Mapping[str, bytes]) -> Path:
    for name, body in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(body)
    return directory


def tar_of(files: Mapping[str, bytes | Path], mode: str = "w") -> bytes:
    """A tar of files by name; a `Path` becomes a symbolic link to it."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        for name, body in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(body, Path):
                info.type, info.linkname = tarfile.SYMTYPE, str(body)
            else:
                info.size = len(body)
            tar.addfile(info, io.BytesIO(body) if isinstance(body, bytes) else None)
    return stream.getvalue()


def deb(files: Mapping[str, bytes | Path], compression: str = "xz") -> bytes:
    """A Debian package that installs these files; compression is xz, gz or zst."""
    if compression == "zst":
        tar = pa.compress(tar_of(files), "zstd", asbytes=True)
    else:
        tar = tar_of(files, f"w:{compression}")
    return ar({"debian-binary": b"2.0\n", "control.tar.gz": b"unused", f"data.tar.{compression}": tar})


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive, the outer format of a .deb."""
    body = b"!<arch>\n"
    for name, data in members.items():
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return body


def write_npm_package(
    directory: Path, name: str, files: Mapping[str, bytes | Path], version: str = "1.0.0"
) -> NpmPackage:
    directory.mkdir(exist_ok=True)
    archive = tar_of(files, "w:gz")
    size = sum(len(body) for body in files.values() if isinstance(body, bytes))
    sha512 = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    package = NpmPackage(name, version, sha512, size)
    (directory / package.archive).write_bytes(archive)
    return package


def write_emoji_packages(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small packages in place of the real ones: 11 Google stills, 3 Fluent stills, and 11 Fluent clips with a still."""
    level = iter(range(1, 256))

    def still(format: str) -> bytes:
        return file_of(reds([next(level)], 16, 16)[0], format)

    def clip() -> bytes:
        return clip_of(reds([next(level), 90, 200], 16, 16), "WEBP", duration=40, lossless=True)

    running = [f"1f3c3-{tone}" for tone in ("1f3fb", "1f3fc", "1f3fd")]
    codes = ["1f600", "1f637", "1f42f", "1f984", "1f98a", "1f355", "1f680", "2764-fe0f", *running]
    of_fluent = ("a9", "00a9-fe0f", "1f600", "1f3f4-e0067")
    files = {
        "google": {f"package/img/google/64/{code}.png": still("PNG") for code in codes},
        "fluent_3d": {f"package/assets/{code}.webp": still("WEBP") for code in of_fluent},
        ANIMATIONS: {f"package/assets/{code}.webp": clip() for code in codes}
        | {"package/assets/1f192.webp": still("WEBP"), "package/assets/.gitkeep": b""},
    }
    for style, bodies in files.items():
        package = write_npm_package(directory, STYLES[style].package.name, bodies)
        monkeypatch.setitem(emoji_packages.STYLES, style, replace(STYLES[style], package=package))
    return directory
