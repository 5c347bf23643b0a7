"""Corpora written in tests, and packages made for them: .deb files, and archives as `npm pack` writes them."""

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

import pytest
from pydantic import TypeAdapter

from mmflow.corpora import CorpusConfig, emoji_packages, write_corpus
from mmflow.corpora.emoji_packages import ANIMATIONS, STYLES
from mmflow.corpora.packages import NpmPackage
from tests.imaging.picture_files import clip_of, file_of, reds


def written(directory: Path, name: str, *, num_steps: int | None = None, **settings: Any) -> list[dict[str, Any]]:
    """The records of a corpus, written with these settings. The progress must count its `num_steps`."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
    corpus = TypeAdapter(CorpusConfig).validate_python({"name": name, **settings})
    steps: list[tuple[int, int]] = []
    write_corpus(directory, corpus, lambda done, total: steps.append((done, total)))
    lines = (directory / "records.jsonl").read_text(encoding="utf-8").splitlines()
    total = len(lines) if num_steps is None else num_steps
    assert steps == [(done, total) for done in range(1, total + 1)]
    assert len(list(directory.iterdir())) == 2  # the images and the records
    return [json.loads(line) for line in lines]


def ar(members: dict[str, bytes]) -> bytes:
    """An ar archive, which a .deb is."""
    body = b"!<arch>\n"
    for name, data in members.items():
        body += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    return body


def write_npm_package(
    directory: Path, name: str, files: Mapping[str, bytes | Path], version: str = "1.0.0"
) -> NpmPackage:
    """Write an archive of files by their names in it; a `Path` is a link to there."""
    directory.mkdir(exist_ok=True)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for member, body in files.items():
            info = tarfile.TarInfo(member)
            if isinstance(body, Path):
                info.type, info.linkname = tarfile.SYMTYPE, str(body)
            else:
                info.size = len(body)
            tar.addfile(info, io.BytesIO(body) if isinstance(body, bytes) else None)
    size = sum(len(body) for body in files.values() if isinstance(body, bytes))
    sha512 = base64.b64encode(hashlib.sha512(stream.getvalue()).digest()).decode()
    package = NpmPackage(name, version, sha512, size)
    (directory / package.archive).write_bytes(stream.getvalue())
    return package


def write_emoji_packages(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small packages in place of the real ones: 11 stills of Google's, 3 of Fluent's, 11 clips and a still."""
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
