"""Any of Pillow's modes to RGB, a strip at a time: 80 megapixels of palette are 80 MB, and as RGBA four times that.

Each further copy of the whole would stand beside it, and a worker is to stay under 1.5 GiB. So the whole is held once,
as its decoder made it; a strip of it is converted and reduced before the next is looked at.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

RGB = npt.NDArray[np.uint8]  # (height, width, 3)
Colour = tuple[int, int, int]

STRIP_PIXELS = 1 << 22
DEEP_GREYS = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", *DEEP_GREYS)
WHITE_IS_ZERO = 0  # TIFF's photometric interpretation


def is_supported(image: Image.Image) -> bool:
    """Whether the mode's values have an agreed range: those of floats, of 32-bit integers and of LAB have none."""
    # Of 32 bits, Pillow makes one that has: a PPM's greys of any depth, brought to 16 bits.
    return image.mode in MODES or (image.mode == "I" and image.format == "PPM")


def solid(image: Image.Image, background: Colour, factor: int = 1) -> Image.Image:
    """A loaded image as RGB, or RGBa where it is transparent, each square of `factor` pixels averaged into one.

    RGBa are colours multiplied by how opaque they are: averages of these are those of what is seen, so that no hidden
    colour bleeds out, and the background is laid under a picture that is small by then. The last square of a row may be
    narrower. `background` is for greys of 16 bits, of which one may stand for it.
    """
    width, height = image.size
    greys = _levels(image) if image.mode.startswith("I") else None
    rows = max(1, STRIP_PIXELS // width // factor) * factor
    whole: Image.Image | None = None
    for top in range(0, height, rows):
        strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
        layer = _layer(strip) if greys is None else _from_deep_grey(strip, greys, background)
        reduced = layer.reduce(factor) if factor > 1 else layer
        if rows >= height:
            return reduced
        whole = whole or Image.new(reduced.mode, (reduced.width, -(-height // factor)))
        whole.paste(reduced, (0, top // factor))
    assert whole is not None
    return whole


def flatten(picture: Image.Image, background: Colour) -> RGB:
    """A picture of `solid` over the background, (height, width, 3) uint8."""
    if picture.mode == "RGB":
        return np.asarray(picture)
    layer = picture.convert("RGBA")
    opaque = Image.new("RGB", layer.size, background)
    opaque.paste(layer, mask=layer)
    return np.asarray(opaque)


def _layer(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    see_through = image.info.get("transparency")
    if isinstance(see_through, tuple) and max(see_through) > 255:  # a PNG of 16 bits, which Pillow has made 8
        image.info["transparency"] = tuple(value >> 8 for value in see_through)
    return image.convert("RGBA").convert("RGBa") if image.mode != "RGBa" else image


def _levels(image: Image.Image) -> RGB:
    """(65536, 3): the colour of each value of a deep grey, by its upper eight bits; Pillow would cut at 255 instead."""
    values = np.arange(65536)
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]  # Pillow leaves 12 bits as they are
        values = np.minimum(values << max(0, 16 - bits), 65535)
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:  # and, of 16, this aside
            values = 65535 - values
    return np.repeat((values >> 8).astype(np.uint8)[:, None], 3, axis=1)


def _from_deep_grey(image: Image.Image, levels: RGB, background: Colour) -> Image.Image:
    deep = np.clip(np.asarray(image), 0, 65535)
    result = levels[deep]
    if "transparency" in image.info:
        result[deep == image.info["transparency"]] = background
    return Image.fromarray(result)
