"""What a recipe says of its sources."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmflow.core.config import Config

SourceKind = Literal["auto", "jsonl", "csv", "parquet", "folder", "webdataset", "img2dataset", "huggingface", "html"]


class FieldsConfig(Config):
    """Which columns or keys of a source hold what; those left out are found under their usual names."""

    key: str | None = None
    """The sample's key. Without one, the record's place in its source makes it."""
    image: str | None = None
    """A path relative to the source, a URI, a URL, or the bytes of an image file."""
    captions: dict[str, str] = Field(default_factory=dict)
    """Column → language (BCP 47, or "und"), in the order of preference: {title: en, title_zh: zh}."""
    split: str | None = None
    """The split's name, where the source has one."""


class SourceConfig(Config):
    """One place that records come from."""

    kind: SourceKind = "auto"
    """What lies there. auto: by the name's ending, and for a directory by what it holds."""
    uri: str
    """A path, s3:// or gs://, with globs and brace ranges: s3://b/{000..127}.tar. Image paths are relative to it."""
    fields: FieldsConfig = FieldsConfig()
    """Columns of tables, keys of JSON."""
    language: str = "und"
    """Language of the captions that carry no tag of their own."""
    license: str | None = None
    """Licence of the records that name none; it goes into each sample's metadata."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the source's records that is used, chosen by a hash of the key."""
    keys: Literal["normalize", "strict"] = "normalize"
    """normalize: a key that tars cannot carry is respelled with a hash behind it; strict: its record is rejected."""
    frames: bool = False
    """In a folder: each directory of images is one record, its images the frames in the order of their names."""
