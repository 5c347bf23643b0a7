"""The Openclipart corpus: packages are read without dpkg, and images and captions stay unchanged."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.openclipart import PACKAGES
from tests.corpora.made import ar, deb, write_files, written

SVG = """<?xml version="1.0" encoding="{encoding}"?>
<svg xmlns="http://www.w3.org/2000/svg" width="9"><title>not this one</title>
 <metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
   <dc:title>{title}</dc:title><dc:description>{description}</dc:description>
   <dc:subject><rdf:Bag><rdf:li></rdf:li>{keywords}</rdf:Bag></dc:subject>
   <dc:creator><cc:Agent><dc:title>Ann Author</dc:title></cc:Agent></dc:creator>
   <cc:license rdf:resource="{license}"/><dc:language>{language}</dc:language>
 </cc:Work></rdf:RDF></metadata><path d="M0 0"/>{rest}"""


def svg(title: str, description: str = "", keywords: str = "", **fields: str) -> bytes:
    defaults = {"encoding": "utf-8", "language": "en", "license": "http://web.resource.org/cc/PublicDomain"}
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords.split())
    values = {**defaults, "rest": "</svg>", **fields}
    return SVG.format(title=title, description=description, keywords=items, **values).encode(values["encoding"])


SVGS = {
    "shapes/stars/one.svg": svg("gramastar", "  two\n lines ", "star shape"),
    "shapes/Two+.svg": svg("L&amp;eacute;zard", "", "lizard", language="EN", encoding="iso-8859-1"),
    "people/three.svg": svg("", "", "", language="nl"),
    "people/four.svg": svg("een meisje", "", "", language="NL", license="http://creativecommons.org/licenses/GPL/2.0/"),
    "people/cut.svg": svg("before the damage", rest="<path"),
    "people/broken.svg": b"<svg",
}
PNGS = {name.replace(".svg", ".png"): f"pixels of {name}".encode() for name in SVGS}
PNGS["people/no-svg.png"] = b""
LINK, TARGET = "people/link.png", "../shapes/stars/one.png"


def package_files(kind: str) -> dict[str, bytes | Path]:
    """Files under usr/share/openclipart, and two outside the corpus."""
    files: dict[str, bytes | Path] = {"png": {**PNGS, LINK: Path(TARGET)}, "svg": dict(SVGS)}[kind]
    outside = {"./usr/share/doc/openclipart/copyright": b"public domain", "./usr/bin/openclipart": b"#!/bin/sh"}
    return outside | {f"./usr/share/openclipart/{kind}/{name}": body for name, body in files.items()}


def write_packages(directory: Path, compression: str = "xz") -> Path:
    kinds = {name: name.rpartition("-")[2] for name in PACKAGES}
    packages = {f"{name}_1%3a0.18_all.deb": deb(package_files(kind), compression) for name, kind in kinds.items()}
    return write_files(directory, packages)


def write(directory: Path, packages: Path | None) -> dict[str, dict[str, Any]]:
    """The records by image, after checks that are the same for every package."""
    records = written(directory, "openclipart", package_directory=packages)
    assert len(records) == 8
    assert [record["image"] for record in records] == sorted(record["image"] for record in records)
    for record in records:
        body = PNGS.get(record["image"].removeprefix("png/"), PNGS["shapes/stars/one.png"])
        assert (directory / record["image"]).read_bytes() == body
    assert (directory / "png" / LINK).readlink() == Path(TARGET)
    return {record["image"].removeprefix("png/"): record for record in records}


@pytest.mark.parametrize("compression", ["xz", "gz", "zst"])
def test_packages_are_read_without_dpkg(tmp_path: Path, compression: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = write_packages(tmp_path / "packages", compression)
    monkeypatch.setenv("PATH", "")
    write(tmp_path / "corpus", packages)


def test_an_installed_tree_gives_the_same_corpus_and_is_not_changed(tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", write_packages(tmp_path / "packages"))
    tree = tmp_path / "openclipart"
    write_files(tree / "png", PNGS)
    write_files(tree / "svg", SVGS)
    (tree / "png" / LINK).symlink_to(TARGET)
    before = sorted(tree.rglob("*"))
    assert write(tmp_path / "again", tree) == records
    assert sorted(tree.rglob("*")) == before


def test_a_rerun_after_a_kill_completes(tmp_path: Path) -> None:
    stray = {"png/people/stray.png": b"of another version", ".unpacked/half.deb": b""}
    (write_files(tmp_path / "corpus", stray) / "png/people/link.png").symlink_to("nowhere")
    write(tmp_path / "corpus", write_packages(tmp_path / "packages"))


def test_captions_are_the_unchanged_title_description_and_keywords(tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", write_packages(tmp_path / "packages"))
    captions = {name: [tuple(caption.values()) for caption in record["captions"]] for name, record in records.items()}
    assert captions == {
        "shapes/stars/one.png": [("en", "gramastar"), ("en", "  two\n lines "), ("en", "star, shape")],
        "shapes/Two+.png": [("en", "L&eacute;zard"), ("en", "lizard")],
        "people/three.png": [],
        "people/four.png": [("und", "een meisje")],
        "people/cut.png": [("en", "before the damage")],
        "people/broken.png": [],
        "people/no-svg.png": [],
        LINK: [],
    }
    assert records["shapes/stars/one.png"]["classes"] == {"group": "shapes", "folder": "shapes/stars"}
    assert records["shapes/Two+.png"]["key"] == "shapes-Two+"
    licenses = {name: record["license"] for name, record in records.items()}
    assert licenses.pop("people/four.png") == "http://creativecommons.org/licenses/GPL/2.0/"
    assert set(licenses.values()) == {"CC-PDDC"}


def test_without_apt_get_the_message_names_package_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisuseError, match=r"apt-get.*package_directory"):
        write(tmp_path / "corpus", None)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_a_failed_download_reports_the_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(
            100, command, stderr="W: warned\nE: Unable to locate package openclipart-png\n"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(MisuseError, match=r"Unable to locate package openclipart-png; run `apt-get update`"):
        write(tmp_path / "corpus", None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda body: b"PK" + body, "not a Debian package"),
        (lambda body: body[:-40], "a damaged package"),
        (lambda body: body[:-40] + b"\0" * 40, "a damaged package"),
        (lambda body: ar({"debian-binary": b"2.0\n"}), "not a Debian package"),
        (lambda body: deb({}), "lack usr/share/openclipart/png or svg"),
    ],
)
def test_a_damaged_package_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    packages = write_packages(tmp_path / "packages")
    (package,) = packages.glob("openclipart-svg*.deb")
    package.write_bytes(damage(package.read_bytes()))
    with pytest.raises(MisuseError, match=message):
        write(tmp_path / "corpus", packages)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_a_link_that_points_outside_is_refused(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages")
    (package,) = packages.glob("openclipart-png*.deb")
    package.write_bytes(deb({"./usr/share/openclipart/png/out.png": Path("/etc/passwd")}))
    with pytest.raises(MisuseError, match="a damaged package"):
        write(tmp_path / "corpus", packages)
