"""The recipe's settings of one source."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mmflow.core.config import OPERATIONAL, Config

# "auto" and the names of the table `KINDS` in sources.py.
SourceKind = Literal["auto", "jsonl", "csv", "parquet", "folder", "webdataset", "img2dataset", "huggingface", "html"]


class FieldsConfig(Config):
    """Which columns or keys of a source hold what. Fields left out are looked for under their usual names."""

    key: str | None = None
    """The sample's key. Without one, the key is made from the record's place in its source."""
    image: str | None = None
    """A path relative to the source, a URI, a URL, or the bytes of an image file."""
    captions: dict[str, str] = Field(default_factory=dict)
    """Column → language (BCP 47, or "und"), preferred columns first: {title: en, title_zh: zh}."""
    split: str | None = None
    """The split's name, where the source has one."""


class SourceConfig(Config):
    """One place that records come from."""

    kind: SourceKind = "auto"
    """The kind of source. auto: a file's extension decides, or what a directory holds."""
    uri: Annotated[str, OPERATIONAL]
    """A path, s3:// or gs://, with globs and brace ranges: s3://b/{000..127}.tar. Image paths are relative to it."""
    fields: FieldsConfig = FieldsConfig()
    """Columns of tables, keys of JSON."""
    language: str = "und"
    """Language of the captions without a tag of their own."""
    license: str | None = None
    """Licence of the records that name none; it goes into each sample's metadata."""
    weight: float = Field(1.0, gt=0, le=1)
    """Share of the source's records that is used, chosen by a hash of the key."""
    keys: Literal["normalize", "strict"] = "normalize"
    """Keys that tars cannot carry. normalize: respell them, with a hash at the end; strict: reject the record."""
    frames: bool = False
    """In a folder: each directory of images is one record, and its images in the order of their names are frames."""
