"""Debian packages as a source of files: downloaded by the system's own client, unpacked by Python alone.

Corpora live there that no other registry has. dpkg is absent where Debian is, so nothing here asks for it.
"""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import pyarrow as pa

from mmflow.core.errors import MisuseError

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60
MOST_BYTES = 4 << 30  # unpacked; the largest corpus has a tenth of it


def package_tree(
    scratch: Path,
    packages: Sequence[str],
    *,
    corpus: str,
    under: PurePosixPath,
    parts: Sequence[str],
    package_directory: Path | None,
) -> Path:
    """The directory with all of `parts`, the files or folders that the packages install right below `under`.

    It is `package_directory` itself where the parts are there; else the packages' .deb files, those that lie there or
    freshly downloaded ones, are unpacked into `scratch`. `corpus` is the name that errors tell.

    Raises MisuseError where neither a package client nor a usable directory is there.
    """
    if package_directory is not None and _has(package_directory, parts):
        return package_directory
    if package_directory is None:
        download(packages, scratch, corpus=corpus)
    folder = package_directory or scratch
    for name in packages:
        found = sorted(folder.glob(f"{name}_*.deb"))
        if not found:
            raise MisuseError(
                f"{folder}: neither {' and '.join(parts)} nor {name}_*.deb; give the corpus's package_directory the "
                f"installed /{under} or the folder of {' and '.join(f'{each}_*.deb' for each in packages)}"
            )
        unpack(found[-1], scratch, under=under)
    tree = scratch / under
    if not _has(tree, parts):
        raise MisuseError(f"{folder}: the packages lack {under}/{' or '.join(parts)}; download them again")
    return tree


def download(packages: Sequence[str], directory: Path, *, corpus: str) -> None:
    """Fetch the packages' .deb files with the system's own client, from wherever it is set up to fetch them."""
    try:
        subprocess.run(["apt-get", "download", *packages], cwd=directory, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        noun = "package" if len(packages) == 1 else "packages"
        raise MisuseError(
            f"corpus {corpus} comes through apt-get, which this machine lacks; bring the Debian {noun} "
            f"{' and '.join(packages)} here and name their folder as the corpus's package_directory"
        ) from None
    except subprocess.CalledProcessError as error:
        complaints = [line for line in error.stderr.splitlines() if line.startswith("E:")] or error.stderr.splitlines()
        raise MisuseError(
            f"apt-get download {' '.join(packages)}: {complaints[0] if complaints else 'failed'}; run `apt-get update`"
            " first, or name a folder with the packages as the corpus's package_directory"
        ) from error


def unpack(package: Path, directory: Path, *, under: PurePosixPath) -> None:
    """Unpack into `directory` what a .deb installs below `under`, a path without its first slash.

    Raises MisuseError where the file is no package, or a damaged one.
    """
    try:
        with package.open("rb") as file:
            for name in _ar_members(file):
                if name.startswith("data.tar"):
                    _unpack_tar(file, name, directory, under)
                    return
    except (OSError, EOFError, ValueError, tarfile.TarError, pa.ArrowException) as error:
        raise MisuseError(f"{package}: a damaged package ({error}); download it again") from error
    raise MisuseError(f"{package}: not a Debian package, it has no data.tar; download it again")


def _has(directory: Path, parts: Sequence[str]) -> bool:
    return all((directory / name).exists() for name in parts)


def _unpack_tar(file: IO[bytes], name: str, directory: Path, under: PurePosixPath) -> None:
    # Ubuntu's packages are zstd, which Python 3.11 cannot read; tarfile finds out by itself what else it is.
    stream = pa.CompressedInputStream(file, "zstd") if name.endswith(".zst") else file
    with tarfile.open(fileobj=stream, mode="r|" if name.endswith(".zst") else "r|*") as tar:
        left = MOST_BYTES
        for member in tar:
            if PurePosixPath(member.name).is_relative_to(under):
                left -= member.size
                if left < 0:
                    raise ValueError(f"more than {MOST_BYTES:,} bytes below {under}")
                tar.extract(member, directory, filter="data")


def _ar_members(file: IO[bytes]) -> Iterator[str]:
    """The names of an ar archive's members; at each, the file stands at the member's first byte."""
    end = file.seek(0, io.SEEK_END)
    file.seek(0)
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        return
    position = len(AR_MAGIC)
    while len(header := file.read(AR_HEADER_BYTES)) == AR_HEADER_BYTES:
        size = int(header[48:58])
        position += AR_HEADER_BYTES
        if (
            size < 0 or position + size > end
        ):  # tarfile would take a stream that is cut between two members for a whole one
            raise EOFError(f"cut short at byte {end}")
        yield header[:16].decode("ascii", "replace").rstrip(" /")
        position += size + size % 2  # a member begins at an even byte
        file.seek(position)
