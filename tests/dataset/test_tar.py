"""The tar codec against `tarfile`, over the inputs that ustar admits, and against damage."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import CorruptArtifactError, MisuseError
from mmflow.dataset.tar import BLOCK_BYTES, Member, TarWriter, header, headers, scan

NAME = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=100).filter(
    lambda name: len(name.encode()) <= 100
)
MEMBERS = st.lists(st.tuples(NAME, st.binary(max_size=1500)), max_size=8)


def write(members: list[tuple[str, bytes]]) -> bytes:
    stream = io.BytesIO()
    tar = TarWriter(stream)
    offsets = tar.add(members[:3]) + tar.add(members[3:])
    checksum = tar.finish()
    data = stream.getvalue()
    assert tar.bytes == len(data)
    assert checksum == xxhash.xxh3_128(data).hexdigest()
    assert [data[o : o + len(body)] for o, (_, body) in zip(offsets, members, strict=True)] == [b for _, b in members]
    return data


@given(NAME, st.integers(0, 8**11 - 1))
def test_header_is_the_one_tarfile_writes(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    info.uname = info.gname = ""
    ours, theirs = header(name, size), info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert ours[:329] == theirs[:329]
    assert ours[345:] == theirs[345:]


@given(MEMBERS)
def test_tarfile_reads_what_is_written(members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=io.BytesIO(write(members)), mode="r|") as tar:
        found = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert found == [(name.rstrip("/"), body) for name, body in members]


@given(MEMBERS)
def test_scan_reads_what_is_written_here_and_by_tarfile(members: list[tuple[str, bytes]]) -> None:
    ours = write(members)
    assert [(member.name, ours[member.offset :][: member.size]) for member in scan(ours)] == members
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size, info.uname, info.mtime = len(body), "someone", 1_700_000_000
            tar.addfile(info, io.BytesIO(body))
    theirs = target.getvalue()
    assert [(member.name, theirs[member.offset :][: member.size]) for member in scan(theirs)] == members


@given(st.data())
def test_no_cut_goes_unnoticed(data: st.DataObject) -> None:
    tar = write([("a.txt", b"x" * 700), ("b.txt", b""), ("c.txt", b"y" * 512)])
    # With one of the two closing blocks left the archive still ends where it says.
    cut = data.draw(st.integers(0, len(tar) - BLOCK_BYTES - 1))
    with pytest.raises(CorruptArtifactError):
        list(scan(tar[:cut]))


@given(st.integers(0, BLOCK_BYTES - 1), st.integers(1, 255))
def test_no_changed_header_byte_goes_unnoticed(position: int, change: int) -> None:
    tar = bytearray(write([("a.txt", b"x"), ("b.txt", b"y")]))
    expected = [Member("a.txt", 512, 1), Member("b.txt", 1536, 1)]
    tar[1024 + position] ^= change
    try:
        found = list(scan(bytes(tar)))
    except CorruptArtifactError:
        return
    # Only spaces and NULs around a number's digits may change without a change of meaning, and only in its own field.
    assert found == expected
    assert 148 <= position < 156


def test_what_ustar_cannot_hold_is_refused() -> None:
    for name in ("", "x" * 101, "a\0b", "é" * 51):
        with pytest.raises(MisuseError):
            header(name, 0)
    with pytest.raises(MisuseError):
        header("a.txt", 8**11)


@given(st.lists(st.tuples(NAME, st.integers(0, 8**11 - 1)), max_size=20))
def test_headers_made_together_are_those_made_one_by_one(members: list[tuple[str, int]]) -> None:
    names, sizes = pa.array([name for name, _ in members], pa.string()), np.array([s for _, s in members], np.int64)
    assert [bytes(row) for row in headers(names, sizes)] == [header(name, size) for name, size in members]
    assert headers(names.slice(1), sizes[1:]).tolist() == headers(names, sizes)[1:].tolist()


def test_headers_that_ustar_cannot_hold_are_refused() -> None:
    for name, size in (("", 0), ("x" * 101, 0), ("a.txt", 8**11)):
        with pytest.raises(MisuseError):
            headers(pa.array([name, "b.txt"]), np.array([size, 0]))
