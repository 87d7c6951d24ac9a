"""Image files as the arrays that a vision model takes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onnxcomp.errors import DataError, OptionError
from onnxcomp.model import TensorSpec

if TYPE_CHECKING:
    from PIL import Image

Layout: TypeAlias = Literal["NCHW", "NHWC"]

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class ImageOptions:
    """How image files become arrays.

    Float inputs get `(pixel / 255 - mean) / std`; if any value of mean or std is above 1, both count on the 0-255
    scale and it is `(pixel - mean) / std`. Without mean and std, pixels are in 0-1. Integer inputs get raw pixels.

    Attributes:
        size: (height, width) in pixels; None takes the model's.
        mean: one value, or one per channel.
        std: one value, or one per channel.
        layout: order of the axes; None looks for an axis of 1 or 3 channels, second axis first.
    """

    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Layout | None = None

    def __post_init__(self) -> None:
        if self.layout not in (None, "NCHW", "NHWC"):
            raise OptionError(f"image layout {self.layout!r} is not known", remedy="use NCHW or NHWC")
        if self.size is not None and min(self.size) < 1:
            raise OptionError(f"image size {self.size} is not positive", remedy="give height and width in pixels")
        if not all(np.isfinite([*self.mean, *self.std])) or min(self.std) <= 0:
            raise OptionError(f"cannot normalise by mean {self.mean} and std {self.std}", remedy="give a positive std")


def image_reader(spec: TensorSpec, options: ImageOptions) -> Callable[[Path], NDArray[Any]]:
    """What turns an image file into one sample of an input, without its batch axis.

    Images become RGB, or gray for one channel, are resized (bilinear) so that they just cover the size, and are
    cropped around the centre.

    Args:
        spec: the model's input, of 4 axes.
        options: what to do instead of what the input suggests.

    Returns:
        A function from a path to an array of shape (channels, height, width), or (height, width, channels) for NHWC,
        in the input's dtype. It raises OSError for a file that is not an image.

    Raises:
        DataError: the input does not take images, or its size is not known.
        OptionError: mean and std do not fit the input.
    """
    if spec.shape is None or len(spec.shape) != 4:
        raise DataError(f"input {spec.name!r} has no 4 axes, so images do not fit it", remedy="give the data as .npz")
    layout: Layout = options.layout or ("NHWC" if spec.shape[3] in (1, 3) and spec.shape[1] not in (1, 3) else "NCHW")
    _, *rest = spec.shape
    channels, height, width = rest if layout == "NCHW" else [rest[2], *rest[:2]]
    channels = channels if isinstance(channels, int) else 3
    if channels not in (1, 3):
        raise DataError(
            f"input {spec.name!r} has {channels} channels as {layout}, images have 1 or 3",
            remedy="say --layout NHWC or NCHW, or give the data as .npz",
        )
    size = options.size or (height, width)
    if not isinstance(size[0], int) or not isinstance(size[1], int):
        raise DataError(f"the model does not say the image size of {spec.name!r}", remedy="say --image-size, like 224")
    target = size[0], size[1]
    normalise = _normaliser(spec, channels, options)

    from PIL import Image  # here, as few data are images

    def read(path: Path) -> NDArray[Any]:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(_cover(image.convert("RGB" if channels == 3 else "L"), *target))
        except (SyntaxError, Image.DecompressionBombError) as error:  # Pillow's other ways to say so
            raise OSError(str(error)) from error
        array = normalise(pixels.reshape(*target, channels))
        return array.transpose(2, 0, 1) if layout == "NCHW" else array

    return read


def _cover(image: "Image.Image", height: int, width: int) -> "Image.Image":
    """Resize to the smallest size that covers height x width, then crop around the centre."""
    from PIL import Image

    scale = max(height / image.height, width / image.width)
    covering = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covering, Image.Resampling.BILINEAR)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normaliser(spec: TensorSpec, channels: int, options: ImageOptions) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """From pixels of shape (height, width, channels) in 0-255 to the values the model takes."""
    if not all(len(values) in (1, channels) for values in (options.mean, options.std)):
        raise OptionError(
            f"mean {options.mean} and std {options.std} do not fit {channels} channels",
            remedy=f"give 1 or {channels} values each",
        )
    mean, std = np.array(options.mean, np.float32), np.array(options.std, np.float32)
    if spec.dtype.kind in "iu":
        if (options.mean, options.std) != (ImageOptions.mean, ImageOptions.std):
            raise OptionError(
                f"input {spec.name!r} takes {spec.dtype} pixels, which are not normalised",
                remedy="leave out mean and std",
            )
        return lambda pixels: pixels
    unit = 1.0 if max(*options.mean, *options.std) > 1 else 255.0
    return lambda pixels: ((pixels / np.float32(unit) - mean) / std).astype(np.float32)
