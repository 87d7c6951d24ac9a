"""Image files against plain arithmetic on their pixels."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from onnxcomp.errors import DataError, OptionError
from onnxcomp.images import ImageOptions, image_reader
from onnxcomp.model import TensorSpec


def spec(*shape: int | str | None, dtype: Any = np.float32) -> TensorSpec:
    return TensorSpec("image", np.dtype(dtype), shape)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)


@pytest.fixture
def picture(pixels: np.ndarray, tmp_path: Path) -> Path:
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_default_is_0_to_1_in_the_models_layout(picture: Path, pixels: np.ndarray) -> None:
    expected = pixels / 255
    channels_first = image_reader(spec(1, 3, 8, 6), ImageOptions())(picture)
    assert channels_first.dtype == np.float32
    np.testing.assert_allclose(channels_first, expected.transpose(2, 0, 1), rtol=1e-6)
    np.testing.assert_allclose(image_reader(spec(1, 8, 6, 3), ImageOptions())(picture), expected, rtol=1e-6)


def test_mean_and_std_on_either_scale(picture: Path, pixels: np.ndarray) -> None:
    mean, std = (0.5, 0.25, 0.125), (0.5, 0.25, 0.75)
    expected = ((pixels / 255 - mean) / std).transpose(2, 0, 1)
    unit = image_reader(spec(1, 3, 8, 6), ImageOptions(mean=mean, std=std))(picture)
    np.testing.assert_allclose(unit, expected, atol=1e-5)
    scaled = ImageOptions(mean=tuple(255 * value for value in mean), std=tuple(255 * value for value in std))
    np.testing.assert_allclose(image_reader(spec(1, 3, 8, 6), scaled)(picture), expected, atol=1e-5)
    one = image_reader(spec(1, 3, 8, 6), ImageOptions(mean=(127.0,), std=(128.0,)))(picture)
    np.testing.assert_allclose(one, ((pixels.astype(float) - 127) / 128).transpose(2, 0, 1), atol=1e-6)


def test_uint8_inputs_get_raw_pixels(picture: Path, pixels: np.ndarray) -> None:
    read = image_reader(spec(None, "h", "w", 3, dtype=np.uint8), ImageOptions(size=(8, 6)))
    assert np.array_equal(read(picture), pixels)
    with pytest.raises(OptionError, match="not normalised"):
        image_reader(spec(1, 3, 8, 6, dtype=np.uint8), ImageOptions(mean=(0.5,)))


def test_shorter_side_is_resized_then_the_centre_cropped(tmp_path: Path) -> None:
    wide = np.zeros((10, 40), np.uint8)
    wide[:, 15:25] = 255  # the central square
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert np.all(image_reader(spec(1, 1, 10, 10), ImageOptions())(tmp_path / "wide.png") == 1)
    half = image_reader(spec(1, 1, 5, 5), ImageOptions())(tmp_path / "wide.png")
    assert half.shape == (1, 5, 5)
    assert half[:, :, 1:-1].min() == 1  # only the columns next to the edge see beyond it
    Image.fromarray(wide.T).save(tmp_path / "tall.png")
    assert np.all(image_reader(spec(1, 1, 10, 10), ImageOptions())(tmp_path / "tall.png") == 1)


def test_one_channel_is_gray(picture: Path, pixels: np.ndarray) -> None:
    gray = image_reader(spec("n", 1, 8, 6), ImageOptions())(picture)
    # ITU-R 601 luma; Pillow rounds it to whole levels.
    np.testing.assert_allclose(gray[0] * 255, pixels @ [0.299, 0.587, 0.114], atol=1)


def test_options_override_the_model(picture: Path) -> None:
    assert image_reader(spec(1, 3, "h", 3), ImageOptions(layout="NHWC", size=(4, 5)))(picture).shape == (4, 5, 3)
    assert image_reader(spec(1, 3, 8, 6), ImageOptions(size=(4, 5)))(picture).shape == (3, 4, 5)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 8), "no 4 axes"), ((1, 4, 8, 8), "4 channels"), ((1, 3, "h", "w"), "image size")],
)
def test_inputs_that_images_do_not_fit(shape: tuple[int | str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        image_reader(spec(*shape), ImageOptions())


@pytest.mark.parametrize("settings", [{"std": (0.0,)}, {"layout": "CHW"}, {"size": (0, 4)}, {"mean": (float("nan"),)}])
def test_bad_options(settings: Any) -> None:
    with pytest.raises(OptionError):
        ImageOptions(**settings)


def test_mean_must_fit_the_channels() -> None:
    with pytest.raises(OptionError, match="3 channels"):
        image_reader(spec(1, 3, 8, 8), ImageOptions(mean=(0.5, 0.5)))


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_broken_images_raise_os_error(picture: Path, keep: int) -> None:
    picture.write_bytes(picture.read_bytes()[:keep])
    with pytest.raises(OSError, match=r".+"):
        image_reader(spec(1, 3, 8, 6), ImageOptions())(picture)
