"""From a table's row, a JSON object or the files beside an image to a record's fields.

Names that the recipe leaves out are the usual ones: those of img2dataset, LAION, DataComp, Conceptual Captions, COCO
and Hugging Face's image folders.
"""

from __future__ import annotations

import base64
import datetime
import decimal
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from mmflow.core.listing import open_stream
from mmflow.sources.config import FieldsConfig
from mmflow.sources.reasons import Rejected, malformed
from mmflow.sources.records import UNREADABLE, Fields, Unit

KEYS = ("key", "__key__")
IMAGES = (
    *("images", "image", "image_path", "image_file", "file_name", "filename", "filepath", "file_path", "path", "img"),
    *("jpg", "jpeg", "png", "webp", "image_url", "url", "URL"),
)
CAPTIONS = ("captions", "caption", "text", "TEXT", "title", "alt", "alt_text", "description", "txt")
SPLITS = ("split",)
# Files beside an image, in folders and in samples of tars: a caption as text, or captions and metadata as JSON.
TEXTS = ("txt", "caption")
SIDECARS = (*TEXTS, "json")


def fields_of(record: Mapping[str, Any], names: FieldsConfig, *, with_image: bool = True) -> Fields:
    """The fields of a record; all that is left is its metadata, as values that JSON can hold.

    Without `with_image`, names of images stay in the metadata: the image comes from elsewhere. Raises Rejected with
    record_malformed for a value of the wrong type.
    """
    key = _first(record, (names.key,) if names.key else KEYS)
    split = _first(record, (names.split,) if names.split else SPLITS)
    captions: dict[str | None, str | None] = dict(names.captions.items()) or {_first(record, CAPTIONS): None}
    image = _first(record, (names.image,) if names.image else IMAGES) if with_image else None
    images, bodies = _images(record[image], image) if image is not None else ([], [])
    no_image = f"`{image}` is empty"
    if image is None:
        wanted = f"`{names.image}`" if names.image else "one of the usual names; say which in `fields.image`"
        no_image = f"no image under {wanted}: there are {', '.join(map(str, record))[:200]}"
    used = {key, split, image, *captions}
    return Fields(
        key=_key(record[key], key) if key else None,
        split=_string(record[split], split).lower() if split else None,
        images=images,
        bodies=bodies,
        captions=[
            (tag or language, text)
            for name, language in captions.items()
            if name is not None
            for tag, text in _captions(record.get(name), name)
        ],
        metadata={str(name): plain(value) for name, value in record.items() if name not in used},
        no_image=no_image,
    )


def read_sidecars(
    unit: Unit, files: Mapping[str, str], names: FieldsConfig, *, images: Sequence[str], key: str | None = None
) -> Fields:
    """The fields of `images`, from the unit's files beside them by extension. Raises Rejected with record_malformed."""
    bodies = {}
    for extension, name in files.items():
        try:
            with open_stream(unit.uri, name) as stream:
                bodies[extension] = stream.read()
        except UNREADABLE as error:
            raise malformed(f"{name} cannot be read: {error.strerror}") from error
    fields = fields_of_sidecars(bodies, names)
    return replace(fields, images=images, key=fields.key if key is None else key)


def fields_of_sidecars(bodies: Mapping[str, bytes], names: FieldsConfig) -> Fields:
    """Captions, split and metadata from the bodies of `SIDECARS`, by extension.

    A text that the JSON repeats is taken once. Raises Rejected with record_malformed.
    """
    fields = Fields()
    if "json" in bodies:
        record = parse_object(bodies["json"])
        # mmflow's own samples have their metadata in an object of its own.
        if set(record) == {"captions", "metadata"} and isinstance(record["metadata"], Mapping):
            record = {**record["metadata"], "captions": record["captions"]}
        fields = fields_of(record, names, with_image=False)
    known = {text.strip() for _, text in fields.captions}
    texts = []
    for extension in TEXTS:
        if extension in bodies:
            try:
                text = bodies[extension].decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise malformed(f".{extension} is not text: {error.reason}") from error
            if text.strip() not in known:
                texts.append((None, text))
                known.add(text.strip())
    return replace(fields, captions=[*texts, *fields.captions])


def parse_object(text: bytes) -> Mapping[str, Any]:
    """A JSON object. Raises Rejected with record_malformed."""
    try:
        value = json.loads(text.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise malformed(f"not text: {error.reason}") from error
    except (ValueError, RecursionError) as error:
        raise malformed(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise malformed(f"a JSON object is needed, not {type(value).__name__}")
    return value


def plain(value: Any) -> Any:
    """A value that JSON can hold: dates as ISO 8601, bytes as text or base64, null for NaN and infinity."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
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


def _first(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first name under which the record has a value."""
    return next((name for name in names if record.get(name) not in (None, "", [])), None)


def _key(value: Any, name: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise _wrong_type(name, "a string or a whole number", value)
    return str(value)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    return value


def _images(value: Any, name: str) -> tuple[list[str], list[bytes]]:
    images: list[str] = []
    bodies: list[bytes] = []
    for item in value if isinstance(value, list) else [value]:
        image = item
        if isinstance(item, Mapping):  # Hugging Face's Image
            image = item.get("bytes") or item.get("path")
        if isinstance(image, str) and image:
            images.append(image)
        elif isinstance(image, (bytes, bytearray)):
            bodies.append(bytes(image))
        else:
            raise _wrong_type(name, "a path, a URL or the bytes of an image", item)
    if images and bodies:
        raise malformed(f"`{name}` mixes paths and bytes")
    return images, bodies


def _captions(value: Any, name: str) -> Iterator[tuple[str | None, str]]:
    for caption in value if isinstance(value, list) else [value]:
        if isinstance(caption, str):
            yield None, caption
        elif isinstance(caption, Mapping):
            language = caption.get("language")
            text = _string(caption.get("text"), f"{name}.text")
            yield None if language is None else _string(language, f"{name}.language"), text
        elif caption is not None:
            raise _wrong_type(name, "a string, an object, or a list of them", caption)


def _wrong_type(name: str, wanted: str, value: Any) -> Rejected:
    return malformed(f"`{name}` must be {wanted}, not {type(value).__name__}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
