"""Which frames of a clip are kept, and an animated file's frames one after another, within bounds.

A frame is what changed since the one before: to see the last, all are decoded. So the cost is known once the frames are
counted, and a file's own count is a claim.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from PIL import Image

from mmflow.imaging import png
from mmflow.sources.reasons import Reason, Rejected

# An animation's frames × its canvas: some ten seconds of decoding. A frame costs no less than `FRAME_PIXELS` would.
MAX_ANIMATION_PIXELS = 1_000_000_000
FRAME_PIXELS = 10_000


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`: the first of each of as many equal spans."""
    kept = min(count, most)
    return [number * count // kept for number in range(kept)]


def first_frame(image: Image.Image) -> int:
    """Where the animation begins: an APNG may have a still picture before it, for what cannot play it."""
    return int(bool(image.info.get("default_image")))


def count_frames(image: Image.Image, data: bytes) -> int:
    """How many frames a file really has. Raises Rejected where it ends before all those that it promises."""
    claimed = int(getattr(image, "n_frames", 1)) - first_frame(image)
    if image.format != "PNG":
        return claimed  # the others are counted by Pillow or by their decoder, from the frames themselves
    found = png.count_frames(data)
    if found < claimed:
        raise Rejected(Reason.image_truncated, f"{found} frames of the {claimed} that its header promises")
    return claimed


def animation_frames(image: Image.Image, numbers: Sequence[int]) -> Iterator[Image.Image]:
    """The opened image at each of these frames, ascending, decoded; the same object each time.

    Raises Rejected where the decoding would cost too much, and whatever Pillow raises on damage.
    """
    width, height = image.size
    start = first_frame(image)
    cost = (numbers[-1] + 1) * max(width * height, FRAME_PIXELS)
    if cost > MAX_ANIMATION_PIXELS:
        what = f"{numbers[-1] + 1} frames of {width}×{height} pixels to decode"
        raise Rejected(Reason.image_too_large, f"{what}; max_frames=1 would keep the first alone")
    for number in numbers:
        image.seek(start + number)
        if image.size != (width, height):  # a GIF's frame beyond the screen, to which Pillow adapts it
            grown = f"frame {number} makes it {image.width}×{image.height} pixels instead of {width}×{height}"
            raise Rejected(Reason.image_unsupported, grown)
        image.load()
        yield image
