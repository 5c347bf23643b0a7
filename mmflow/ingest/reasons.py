"""Why a record is not in the dataset: one closed list, so that quarantine can be counted, compared and acted upon."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What is wrong with a record. The detail beside it says which value, where."""

    record_malformed = "record_malformed"
    key_invalid = "key_invalid"
    key_repeated = "key_repeated"
    caption_missing = "caption_missing"
    caption_too_short = "caption_too_short"
    caption_too_long = "caption_too_long"
    image_missing = "image_missing"
    image_unreadable = "image_unreadable"
    image_not_an_image = "image_not_an_image"
    image_truncated = "image_truncated"
    image_too_large = "image_too_large"
    image_too_small = "image_too_small"
    image_too_narrow = "image_too_narrow"
    image_animated = "image_animated"
    image_unsupported = "image_unsupported"


class Rejected(Exception):  # noqa: N818 - a verdict on the data, not an error of the program
    """A record goes to quarantine with this reason; its neighbours go on."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
