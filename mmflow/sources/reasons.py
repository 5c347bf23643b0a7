"""Why a record is not in the dataset: one closed list, so that quarantine can be counted, compared and acted upon."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What is wrong with a record. The detail beside it says which value, where."""

    record_malformed = "record_malformed"
    source_damaged = "source_damaged"  # a tar or a table that ends early: what could not be read of it
    not_sampled = "not_sampled"  # the source's weight
    key_invalid = "key_invalid"
    key_repeated = "key_repeated"
    caption_missing = "caption_missing"
    caption_too_short = "caption_too_short"
    caption_too_long = "caption_too_long"
    caption_boilerplate = "caption_boilerplate"
    caption_language = "caption_language"
    caption_too_common = "caption_too_common"
    image_missing = "image_missing"
    image_unreadable = "image_unreadable"
    image_not_an_image = "image_not_an_image"
    image_truncated = "image_truncated"
    image_too_large = "image_too_large"
    image_too_small = "image_too_small"
    image_too_narrow = "image_too_narrow"
    image_unsupported = "image_unsupported"
    fetch_pending = "fetch_pending"  # not tried yet
    fetch_refused = "fetch_refused"  # an address that is never asked: private, not http, too many redirects
    fetch_opted_out = "fetch_opted_out"  # robots.txt, X-Robots-Tag, TDM
    fetch_gone = "fetch_gone"  # the server's lasting no
    fetch_too_large = "fetch_too_large"
    fetch_failed = "fetch_failed"  # may pass: tried again by the next run
    duplicate_exact = "duplicate_exact"
    duplicate_near = "duplicate_near"
    duplicate_caption = "duplicate_caption"
    duplicate_of_evaluation = "duplicate_of_evaluation"


class Rejected(Exception):  # noqa: N818 - a verdict on the data, not an error of the program
    """A record goes to quarantine with this reason; its neighbours go on."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
