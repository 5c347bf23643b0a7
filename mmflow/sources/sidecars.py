"""What stands beside an image: a caption as text, captions and metadata as JSON, in folders and in samples of tars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from mmflow.core.listing import open_stream
from mmflow.sources.config import FieldsConfig
from mmflow.sources.fields import Fields, fields_of
from mmflow.sources.lists import parse_object
from mmflow.sources.records import UNREADABLE, malformed
from mmflow.sources.units import Unit

TEXTS = ("txt", "caption")
SIDECARS = (*TEXTS, "json")


def read_sidecars(unit: Unit, files: Mapping[str, str], names: FieldsConfig) -> Fields:
    """`fields_of_sidecars` of a unit's files, by extension. Raises Rejected, also for a file that cannot be read."""
    bodies = {}
    for kind, name in files.items():
        try:
            with open_stream(unit.uri, name) as stream:
                bodies[kind] = stream.read()
        except UNREADABLE as error:
            raise malformed(f"{name} cannot be read: {error.strerror}") from error
    return fields_of_sidecars(bodies, names)


def fields_of_sidecars(bodies: Mapping[str, bytes], names: FieldsConfig) -> Fields:
    """Captions, split and metadata from the bodies by extension: `SIDECARS`.

    A text that the JSON has too is not repeated. Raises Rejected with record_malformed.
    """
    fields = Fields()
    if "json" in bodies:
        record = parse_object(bodies["json"])
        # A sample of ours: its metadata is an object of its own.
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
