"""What Pillow leaves open about PNG files: the notes that it unpacks, and how many frames there really are."""

from __future__ import annotations

from collections.abc import Iterator

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Texts and colour profiles. None is used, and one of more than 1 MiB unpacked, or with a wrong checksum, makes Pillow
# refuse a picture that every browser shows.
NOTES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
FRAME = b"fcTL"


def without_notes(data: bytes) -> bytes:
    """The same picture without its notes; any other file as it is."""
    if not data.startswith(SIGNATURE):
        return data
    kept, position = [], 0
    for kind, start, end in _chunks(data):
        if kind in NOTES:
            kept.append(data[position:start])
            position = end
    return b"".join([*kept, data[position:]]) if kept else data


def count_frames(data: bytes) -> int:
    """The frames of an animated PNG that are in the file, whatever its header promises."""
    return sum(kind == FRAME for kind, _, _ in _chunks(data))


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, start and end of each chunk."""
    start = len(SIGNATURE)
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        yield data[start + 4 : start + 8], start, end
        start = end
