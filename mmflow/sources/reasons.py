"""Why a record is not in the dataset: one closed list, so that quarantine can be counted, compared and acted upon."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """What is wrong with a record. The detail beside it names the value and the place."""

    record_malformed = "record_malformed"
    source_damaged = "source_damaged"  # the unreadable rest of a tar or a table
    not_sampled = "not_sampled"  # left out by the source's weight
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
    fetch_refused = "fetch_refused"  # never requested: private address, not http, too many redirects
    fetch_opted_out = "fetch_opted_out"  # robots.txt, X-Robots-Tag, TDM
    fetch_gone = "fetch_gone"  # the server's permanent no
    fetch_too_large = "fetch_too_large"
    fetch_failed = "fetch_failed"  # temporary: the next run tries again
    duplicate_exact = "duplicate_exact"
    duplicate_near = "duplicate_near"
    duplicate_caption = "duplicate_caption"
    duplicate_of_evaluation = "duplicate_of_evaluation"


class Rejected(Exception):  # noqa: N818 - a verdict on the data, not an error of the program
    """This record goes to quarantine; the records around it are not affected."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def malformed(detail: str) -> Rejected:
    """A rejection with record_malformed."""
    return Rejected(Reason.record_malformed, detail)


def damaged(detail: str) -> Rejected:
    """A rejection with source_damaged."""
    return Rejected(Reason.source_damaged, detail)
