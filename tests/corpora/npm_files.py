"""npm packages made in memory: archives as `npm pack` writes them."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from mmflow.corpora import emoji_packages
from mmflow.corpora.emoji_packages import ANIMATIONS, STYLES
from mmflow.corpora.npm import NpmPackage
from tests.imaging.picture_files import clip_of, file_of, reds


def write_package(directory: Path, name: str, files: Mapping[str, bytes | Path], version: str = "1.0.0") -> NpmPackage:
    """Write the archive with the files, by their names in it; a `Path` is a link there. Return what tells it."""
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
        package = write_package(directory, STYLES[style].package.name, bodies)
        monkeypatch.setitem(emoji_packages.STYLES, style, replace(STYLES[style], package=package))
    return directory
