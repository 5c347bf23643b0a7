"""What a record of a table or JSON says: key, image, captions and split, under our names, the user's or the usual.

The names are those of img2dataset, LAION, DataComp, Conceptual Captions, COCO and Hugging Face's image folders.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmflow.sources.config import FieldsConfig
from mmflow.sources.reasons import Reason, Rejected

KEYS = ("key", "__key__")
IMAGES = (
    "images",
    "image",
    "image_path",
    "image_file",
    "file_name",
    "filename",
    "filepath",
    "file_path",
    "path",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "image_url",
    "url",
    "URL",
)
CAPTIONS = (
    "captions",
    "caption",
    "text",
    "TEXT",
    "title",
    "alt",
    "alt_text",
    "description",
    "txt",
)
SPLITS = ("split",)


@dataclass(frozen=True, slots=True)
class Fields:
    """A record's parts. `captions` are (language, text), the language None where nothing says it.

    `images` are paths or URIs, or else `bodies` are files' bytes. Where there is neither, `no_image` says why.
    """

    key: str | None = None
    split: str | None = None
    images: Sequence[str] = ()
    bodies: Sequence[bytes] = ()
    captions: Sequence[tuple[str | None, str]] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)
    no_image: str = "it names no image"


def fields_of(record: Mapping[str, Any], names: FieldsConfig, *, with_image: bool = True) -> Fields:
    """The parts of a record; what is none of them is its metadata, in values that JSON has.

    `with_image` False leaves a record's mention of images in its metadata: they come from elsewhere. Raises Rejected
    with record_malformed for a value that cannot mean what its name says.
    """
    key_name = _first(record, (names.key,) if names.key else KEYS)
    split_name = _first(record, (names.split,) if names.split else SPLITS)
    caption_names: dict[str | None, str | None] = dict(names.captions.items()) or {_first(record, CAPTIONS): None}
    image_name = _first(record, (names.image,) if names.image else IMAGES) if with_image else None
    images: list[str] = []
    bodies: list[bytes] = []
    no_image = "it names no image"
    if image_name is not None:
        images, bodies = _images(record[image_name], image_name)
        no_image = f"`{image_name}` is empty"
    elif with_image:
        wanted = f"`{names.image}`" if names.image else "one of the usual names; say which in `fields.image`"
        no_image = f"no image under {wanted}: there are {', '.join(map(str, record))[:200]}"
    captions = [
        (tag or language, text)
        for name, language in caption_names.items()
        if name is not None
        for tag, text in _captions(record.get(name), name)
    ]
    used = {key_name, split_name, image_name, *caption_names}
    return Fields(
        key=_key(record[key_name], key_name) if key_name else None,
        split=_split(record[split_name], split_name) if split_name else None,
        images=images,
        bodies=bodies,
        captions=captions,
        metadata={str(name): plain(value) for name, value in record.items() if name not in used},
        no_image=no_image,
    )


def _first(record: Mapping[str, Any], names: Sequence[str | None]) -> str | None:
    """The first name under which the record has a value."""
    return next((name for name in names if name is not None and record.get(name) not in (None, "", [])), None)


def _key(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _wrong(name, "a string or a whole number", value)
    return str(value)


def _split(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value.lower()


def _images(value: Any, name: str) -> tuple[list[str], list[bytes]]:
    images: list[str] = []
    bodies: list[bytes] = []
    for each in value if isinstance(value, list) else [value]:
        item = each
        if isinstance(item, Mapping):  # Hugging Face's Image
            item = each.get("bytes") or each.get("path")
        if isinstance(item, str) and item:
            images.append(item)
        elif isinstance(item, (bytes, bytearray)):
            bodies.append(bytes(item))
        else:
            raise _wrong(name, "a path, a URL or an image's bytes", each)
    if images and bodies:
        raise Rejected(Reason.record_malformed, f"`{name}` has paths and bytes mixed")
    return images, bodies


def _captions(value: Any, name: str) -> Iterator[tuple[str | None, str]]:
    for caption in value if isinstance(value, list) else [value]:
        if caption is None:
            continue
        if isinstance(caption, str):
            yield None, caption
            continue
        if not isinstance(caption, Mapping):
            raise _wrong(name, "a string, an object, or a list of them", caption)
        language, text = caption.get("language"), caption.get("text")
        if not isinstance(text, str):
            raise _wrong(f"{name}.text", "a string", text)
        if language is not None and not isinstance(language, str):
            raise _wrong(f"{name}.language", "a string", language)
        yield language, text


def plain(value: Any) -> Any:
    """A value that JSON has: dates as ISO 8601, bytes as text or base64, and null for a number that is none."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, (decimal.Decimal, datetime.timedelta)):
        return str(value)
    return repr(value)


def _wrong(name: str, wanted: str, value: Any) -> Rejected:
    return Rejected(Reason.record_malformed, f"`{name}` must be {wanted}, not {type(value).__name__}")
