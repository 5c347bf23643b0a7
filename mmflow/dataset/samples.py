"""What is a sample in a tar that others wrote, and what its .txt and .json say of the image.

The rules are webdataset's: neighbours with one key are a sample, and a key ends at the first dot of the base name.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from typing import IO, Any

import xxhash

from mmflow.cleaning.captions import Caption, clean_text, estimate_tokens
from mmflow.core.artifacts import canonical_json
from mmflow.core.errors import CorruptArtifactError
from mmflow.core.listing import IMAGE_EXTENSIONS
from mmflow.dataset.index import MEMBERS
from mmflow.imaging.header import probe
from mmflow.sources.fields import SIDECARS, TEXTS
from mmflow.sources.reasons import Reason, Rejected
from mmflow.sources.webdataset import Damage, Member, read_members, split_name

TEXT_KEYS = ("captions", "caption", "text", "TEXT")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}  # others by their name in lower case
MAX_KEY_BYTES = 1000

Row = dict[str, Any]
Group = list[tuple[str, Member]]


def index_tar(
    stream: IO[bytes], source: str, license: str | None, captions_required: bool
) -> tuple[list[Row], list[Row], str, int]:
    """(index rows, rejected records, xxh3_128 of the tar, its bytes), from one read to the end of the stream.

    Raises CorruptArtifactError for a damaged tar, naming the byte.
    """
    entries: list[Row] = []
    rejected: list[Row] = []
    hashed = _Hashed(stream)
    for key, members in read_groups(hashed):
        try:
            entries.append({"row": len(entries), **index_sample(key, members, license, captions_required)})
        except Rejected as rejection:
            rejected.append(
                {
                    "source": _writable(f"{source}:{members[0][1].name}"),
                    "key": _writable(key),
                    "reason": str(rejection.reason),
                    "detail": _writable(rejection.detail),
                }
            )
    return entries, rejected, hashed.digest.hexdigest(), hashed.bytes


class _Hashed(io.RawIOBase):
    """A stream that hashes what is read of it: the bytes of a tar are gone through once."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.digest = xxhash.xxh3_128()
        self.bytes = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self.digest.update(data)
        self.bytes += len(data)
        return data


def read_groups(stream: Any) -> Iterator[tuple[str, Group]]:
    """(key, [(suffix, member)]) of neighbours that share a key, as webdataset groups them.

    A suffix that comes again begins a sample anew: what follows is another record of the same key.
    """
    key: str | None = None
    group: Group = []
    for member in read_members(stream, _is_wanted):
        if isinstance(member, Damage):
            raise CorruptArtifactError(f"byte {member.offset}: {member.what}")
        split = split_name(member.name)
        if split is None:
            continue  # a README or a checksum file between the samples
        stem, suffix = split
        if group and (stem != key or any(suffix == other for other, _ in group)):
            yield str(key), group
            group = []
        key = stem
        group.append((suffix, member))
    if group:
        yield str(key), group


def _is_wanted(name: str) -> bool:
    split = split_name(name)
    return split is not None and split[1] in (*IMAGE_EXTENSIONS, *SIDECARS)


def index_sample(key: str, members: Group, license: str | None, captions_required: bool) -> Row:
    """A sample's row of the index, but for its number. Raises Rejected."""
    check_key(key)
    suffixes = dict(members)
    there = f"has {', '.join(suffixes)}"[:200]
    image = next((member for suffix, member in members if suffix in IMAGE_EXTENSIONS), None)
    if image is None:
        if any(suffix.rpartition(".")[2] in IMAGE_EXTENSIONS for suffix in suffixes):
            raise Rejected(Reason.key_invalid, f"{there}: a key with a dot in it, which fuses with its neighbours")
        raise Rejected(Reason.image_missing, there)
    txt = next((suffixes[suffix] for suffix in TEXTS if suffix in suffixes), None)
    fields = suffixes.get("json")
    for member in (image, txt, fields):
        if member is not None and member.body is None:
            raise Rejected(Reason.image_too_large, f"{member.name}: {member.size} bytes")
    bodies = [member.body or b"" if member is not None else b"" for member in (image, txt, fields)]
    if not is_json(bodies[2]):
        fields, bodies[2] = None, b""
    header = probe(bodies[0])
    try:
        captions, metadata = read_texts(bodies[1], bodies[2])
    except UnicodeDecodeError as error:
        raise Rejected(Reason.record_malformed, f"{txt.name if txt else ''}: not UTF-8: {error.reason}") from error
    if captions_required and not captions:
        raise Rejected(Reason.caption_missing, there)
    named = metadata.get("license")
    entry: Row = {
        "key": key,
        "image_extension": EXTENSIONS.get(header.format, header.format.lower()),
        "width": header.width,
        "height": header.height,
        "caption_tokens": max((estimate_tokens(caption["text"]) for caption in captions), default=0),
        "caption_characters": max((len(caption["text"]) for caption in captions), default=0),
        "languages": [caption["language"] for caption in captions],
        "license": named if isinstance(named, str) else license,
        "frames": [],
    }
    for column, member, body in zip(MEMBERS, (image, txt, fields), bodies, strict=True):
        entry[f"{column}_offset"] = (member or image).offset
        entry[f"{column}_bytes"] = len(body)
        entry[f"{column}_xxh3"] = xxhash.xxh3_64_intdigest(body)
    return entry


def check_key(key: str) -> None:
    """Raises Rejected for a key that is nobody's name: of control characters, or out of its folder."""
    if not key.isprintable() or len(key.encode(errors="surrogateescape")) > MAX_KEY_BYTES:
        raise Rejected(Reason.key_invalid, f"{key[:100]!a}: not printable, or over {MAX_KEY_BYTES} bytes")
    if key.startswith("/") or ".." in key.split("/"):
        raise Rejected(Reason.key_invalid, f"{key[:100]!r}: leads out of its folder")


def read_texts(txt: bytes, body: bytes) -> tuple[tuple[Caption, ...], dict[str, Any]]:
    """(captions, metadata) of a sample, from the bodies of its .txt and .json, either of which may be empty.

    A JSON of ours says both, that there is no caption too. Of another's, the .txt is the caption if it holds text, else
    what the JSON has under captions, caption, text or TEXT; all of the JSON is metadata. Raises ValueError for what is
    no text or no JSON.
    """
    value = json.loads(body) if body else {}
    metadata = value if isinstance(value, dict) else {"json": value}
    ours = _ours(metadata.get("captions")) if isinstance(metadata.get("metadata"), dict) else None
    if ours:
        return ours, metadata["metadata"]
    if set(metadata) != {"captions", "metadata"}:
        ours = None  # who else writes a list of no captions may have them under another name
    if text := clean_text(txt.decode()):
        return (Caption(language="und", text=text),), metadata
    if ours is not None:
        return (), metadata["metadata"]
    for key in TEXT_KEYS:
        if found := _captions(metadata.get(key)):
            return found, metadata
    return (), metadata


def is_json(body: bytes) -> bool:
    """Whether a body is JSON that can be written again: half of a surrogate pair cannot."""
    with contextlib.suppress(ValueError, RecursionError):
        canonical_json(json.loads(body)).encode()
        return True
    return False


def _ours(value: Any) -> tuple[Caption, ...] | None:
    if not isinstance(value, list):
        return None
    if not all(isinstance(each, dict) and each.keys() == {"language", "text"} for each in value):
        return None
    return tuple(Caption(language=each["language"], text=each["text"]) for each in value)


def _captions(value: Any) -> tuple[Caption, ...]:
    """What a foreign JSON has for captions: a string, an object with a text, or a list of these."""
    found = []
    for each in value if isinstance(value, list) else [value]:
        fields = each if isinstance(each, dict) else {"text": each}
        text, language = fields.get("text", fields.get("caption")), fields.get("language")
        if isinstance(text, str) and (text := clean_text(text)):
            found.append(Caption(language=language if isinstance(language, str) and language else "und", text=text))
    return tuple(found)


def _writable(text: str) -> str:
    """Names may hold bytes that are no UTF-8, which no table can."""
    return text.encode(errors="replace").decode()
