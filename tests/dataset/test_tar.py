"""The tar writer against `tarfile`, for all names and sizes that ustar allows."""

import io
import tarfile

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from mmflow.core.errors import MisuseError
from mmflow.dataset.tar import TarWriter, header, headers

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
def test_headers_equal_those_of_tarfile(name: str, size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size = size
    info.uname = info.gname = ""
    ours, theirs = header(name, size), info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")
    assert ours[:329] == theirs[:329]
    assert ours[345:] == theirs[345:]


@given(MEMBERS)
def test_tarfile_reads_what_is_written(members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(fileobj=io.BytesIO(write(members)), mode="r|") as tar:
        members_read = [(info.name, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    assert members_read == [(name.rstrip("/"), body) for name, body in members]


def test_names_and_sizes_beyond_ustar_are_refused() -> None:
    with pytest.raises(MisuseError):
        header("a\0b", 0)
    for name, size in (("", 0), ("x" * 101, 0), ("é" * 51, 0), ("a.txt", 8**11)):
        with pytest.raises(MisuseError):
            header(name, size)
        with pytest.raises(MisuseError):
            headers(pa.array([name, "b.txt"]), np.array([size, 0]))


@given(st.lists(st.tuples(NAME, st.integers(0, 8**11 - 1)), max_size=20))
def test_headers_made_in_a_batch_equal_single_headers(members: list[tuple[str, int]]) -> None:
    names, sizes = pa.array([name for name, _ in members], pa.string()), np.array([s for _, s in members], np.int64)
    assert [bytes(row) for row in headers(names, sizes)] == [header(name, size) for name, size in members]
    assert headers(names.slice(1), sizes[1:]).tolist() == headers(names, sizes)[1:].tolist()
