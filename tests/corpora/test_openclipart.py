"""The dirty corpus: packages are read wherever Python runs, and what they hold goes on as it is."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mmflow.core.errors import MisuseError
from mmflow.corpora.openclipart import PACKAGES
from mmflow.recipe import load_recipe
from tests.corpora.made import ar, written

SVG = """<?xml version="1.0" encoding="{encoding}"?>
<svg xmlns="http://www.w3.org/2000/svg" width="9"><title>not this one</title>
 <metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
  xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about="">
   <dc:title>{title}</dc:title><dc:description>{description}</dc:description>
   <dc:subject><rdf:Bag><rdf:li></rdf:li>{keywords}</rdf:Bag></dc:subject>
   <dc:creator><cc:Agent><dc:title>Ann Author</dc:title></cc:Agent></dc:creator>
   <cc:license rdf:resource="{license}"/><dc:language>{language}</dc:language>
 </cc:Work></rdf:RDF></metadata><path d="M0 0"/>{rest}"""
RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "openclipart.yaml"


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


def add(tar: tarfile.TarFile, name: str, body: bytes = b"", link: str = "") -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(body)
    if link:
        entry.type, entry.linkname = tarfile.SYMTYPE, link
    tar.addfile(entry, io.BytesIO(body))


def data_tar(kind: str) -> bytes:
    """The tar within a package: its files under usr/share/openclipart, and two that are none of the corpus."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "./usr/share/doc/openclipart/copyright", b"public domain")
        add(tar, "./usr/bin/openclipart", b"#!/bin/sh")
        for name, body in (PNGS if kind == "png" else SVGS).items():
            add(tar, f"./usr/share/openclipart/{kind}/{name}", body)
        if kind == "png":
            add(tar, f"./usr/share/openclipart/png/{LINK}", link=TARGET)
    return stream.getvalue()


def compressed(data: bytes, ending: str) -> bytes:
    if ending == "xz":
        import lzma

        return lzma.compress(data)
    return pa.compress(data, "zstd" if ending == "zst" else "gzip", asbytes=True)


def write_packages(directory: Path, ending: str = "xz") -> Path:
    directory.mkdir()
    for name in PACKAGES:
        tar = compressed(data_tar(name.rpartition("-")[2]), ending)
        members = {"debian-binary": b"2.0\n", "control.tar.gz": b"odd", f"data.tar.{ending}": tar}
        (directory / f"{name}_1%3a0.18_all.deb").write_bytes(ar(members))
    return directory


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


@pytest.mark.parametrize("ending", ["xz", "gz", "zst"])
def test_packages_are_read_without_dpkg(tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = write_packages(tmp_path / "packages", ending)
    monkeypatch.setenv("PATH", "")
    write(tmp_path / "corpus", packages)


def test_an_installed_tree_gives_the_same_corpus_and_stays_untouched(tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", write_packages(tmp_path / "packages"))
    tree = tmp_path / "openclipart"
    for kind, files in (("png", PNGS), ("svg", SVGS)):
        for name, body in files.items():
            path = tree / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
    (tree / "png" / LINK).symlink_to(TARGET)
    before = sorted(tree.rglob("*"))
    assert write(tmp_path / "again", tree) == records
    assert sorted(tree.rglob("*")) == before


def test_a_run_after_a_killed_one_completes(tmp_path: Path) -> None:
    left = tmp_path / "corpus" / "png" / "people"
    left.mkdir(parents=True)
    (left / "link.png").symlink_to("nowhere")
    (left / "stray.png").write_bytes(b"of another version")
    (tmp_path / "corpus" / ".unpacked").mkdir()
    (tmp_path / "corpus" / ".unpacked" / "half.deb").write_bytes(b"")
    write(tmp_path / "corpus", write_packages(tmp_path / "packages"))


def test_captions_are_title_description_and_keywords_as_written(tmp_path: Path) -> None:
    records = write(tmp_path / "corpus", write_packages(tmp_path / "packages"))
    captions = {name: [tuple(each.values()) for each in record["captions"]] for name, record in records.items()}
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


def test_without_a_package_client_the_message_says_what_to_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisuseError, match=r"apt-get, which this machine lacks; bring .*corpus's package_directory"):
        write(tmp_path / "corpus", None)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(
            100, command, stderr="W: warned\nE: Unable to locate package openclipart-png\n"
        )

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(MisuseError, match=r"E: Unable to locate package openclipart-png; run `apt-get update`, or"):
        write(tmp_path / "corpus", None)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda body: b"PK" + body, "not a Debian package"),
        (lambda body: body[:-40], "a damaged package"),
        (lambda body: body[:-40] + b"\0" * 40, "a damaged package"),
        (lambda body: ar({"debian-binary": b"2.0\n"}), "not a Debian package"),
        (lambda body: ar({"data.tar.xz": compressed(b"\0" * 1024, "xz")}), "lack usr/share/openclipart/png or svg"),
    ],
)
def test_a_damaged_package_is_named(tmp_path: Path, damage: Any, message: str) -> None:
    packages = write_packages(tmp_path / "packages")
    (package,) = packages.glob("openclipart-svg*.deb")
    package.write_bytes(damage(package.read_bytes()))
    with pytest.raises(MisuseError, match=message):
        write(tmp_path / "corpus", packages)
    assert not (tmp_path / "corpus" / "records.jsonl").exists()


def test_a_member_that_points_outside_is_refused(tmp_path: Path) -> None:
    packages = write_packages(tmp_path / "packages")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "./usr/share/openclipart/png/out.png", link="/etc/passwd")
    (package,) = packages.glob("openclipart-png*.deb")
    package.write_bytes(ar({"data.tar.gz": compressed(stream.getvalue(), "gz")}))
    with pytest.raises(MisuseError, match="a damaged package"):
        write(tmp_path / "corpus", packages)


def test_each_corpus_refuses_the_options_of_the_other(tmp_path: Path) -> None:
    assert load_recipe(str(RECIPE), ["corpus.package_directory=/usr/share/openclipart"]).corpus is not None
    with pytest.raises(MisuseError, match=r"corpus\.image_pixels: unknown key; the keys here are name, package_dir"):
        load_recipe(str(RECIPE), ["corpus.image_pixels=64"])
    with pytest.raises(MisuseError, match=r"corpus\.imagepixels: unknown key; did you mean 'image_pixels'"):
        load_recipe(str(RECIPE), ["corpus={name: openmoji, imagepixels: 64}"])
    with pytest.raises(MisuseError, match=r"corpus\.name: 'openclip' is none of 'openmoji', 'openclipart'"):
        load_recipe(str(RECIPE), ["corpus.name=openclip"])
    with pytest.raises(MisuseError, match=r"corpus\.name: missing; it is required"):
        load_recipe(str(RECIPE), ["corpus={}"])
