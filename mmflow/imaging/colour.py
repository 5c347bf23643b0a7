"""Any of Pillow's modes to RGB, one strip at a time, so that a worker stays under 1.5 GiB.

80 megapixels of a palette image take 80 MB; as RGBA they would take four times that, once more for every copy. So the
whole image is held once, as its decoder made it, and each strip is converted and reduced before the next is read.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

Pixels = npt.NDArray[np.uint8]  # (height, width, 3)
Colour = tuple[int, int, int]

WHITE = (255, 255, 255)
STRIP_PIXELS = 1 << 22
DEEP_GREYS = ("I;16", "I;16L", "I;16B", "I;16N")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", *DEEP_GREYS)
WHITE_IS_ZERO = 0  # TIFF's photometric interpretation


def is_supported(image: Image.Image) -> bool:
    """Whether the mode's values have a known range. Floats, 32-bit integers and LAB have none."""
    # The exception: Pillow reads a PPM's greys as 32-bit integers, scaled to 16 bits.
    return image.mode in MODES or (image.mode == "I" and image.format == "PPM")


def solid(image: Image.Image, background: Colour, factor: int = 1) -> Image.Image:
    """A loaded image as RGB, or as RGBa if it has transparency, with each square of `factor` pixels averaged into one.

    RGBa is premultiplied: an average then shows what is seen, hidden colours do not bleed out, and the background can
    be added after the image is small. The last square of a row may be narrower. `background` replaces the transparent
    value of 16-bit greys.
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


def flatten(picture: Image.Image, background: Colour) -> Pixels:
    """The result of `solid` over the background, (height, width, 3) uint8."""
    if picture.mode == "RGB":
        return np.asarray(picture)
    layer = picture.convert("RGBA")
    opaque = Image.new("RGB", layer.size, background)
    opaque.paste(layer, mask=layer)
    return np.asarray(opaque)


def _layer(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # a 16-bit PNG, which Pillow has reduced to 8 bits
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    return image.convert("RGBA").convert("RGBa") if image.mode != "RGBa" else image


def _levels(image: Image.Image) -> Pixels:
    """(65536, 3): the colour of each value of a deep grey, from its upper eight bits. Pillow would clip at 255."""
    values = np.arange(65536)
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(BITSPERSAMPLE, (16,))[0]  # Pillow does not scale 12-bit values
        values = np.minimum(values << max(0, 16 - bits), 65535)
        if image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO:  # Pillow ignores this tag for 16 bits
            values = 65535 - values
    return np.repeat((values >> 8).astype(np.uint8)[:, None], 3, axis=1)


def _from_deep_grey(image: Image.Image, levels: Pixels, background: Colour) -> Image.Image:
    deep = np.clip(np.asarray(image), 0, 65535)
    result = levels[deep]
    if "transparency" in image.info:
        result[deep == image.info["transparency"]] = background
    return Image.fromarray(result)
