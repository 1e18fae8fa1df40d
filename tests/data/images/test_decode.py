"""Every kind of image file becomes RGB bytes as stored, or an error that names the file."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.images.decode
from data.images.decode import ImageError, read_image

HEIGHT, WIDTH = 24, 40


@pytest.fixture
def photo() -> np.ndarray:
    """Smooth enough for JPEG to keep it nearly: a gradient of each color."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return np.stack([x * 6, y * 10, 255 - x * 3 - y * 3], axis=2).astype(np.uint8)


@pytest.fixture(params=["pillow", "simplejpeg"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "simplejpeg":
        pytest.importorskip("simplejpeg")
    else:
        monkeypatch.setattr(data.images.decode, "simplejpeg", None)
    return request.param


def mean_difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 50}])
def test_color_jpegs_equal_pillows_pixels(tmp_path: Path, photo: np.ndarray, decoder: str, options: dict) -> None:
    file = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(-20, 20, photo.shape)
    Image.fromarray(np.clip(photo + noise, 0, 255).astype(np.uint8)).save(file, **options)
    pixels = read_image(file)
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    with Image.open(file) as image:
        assert np.array_equal(pixels, np.asarray(image))


def test_lossless_rgb_is_read_exactly(tmp_path: Path, photo: np.ndarray) -> None:
    for name in ("a.png", "a.bmp", "a.tif", "a.ppm"):
        Image.fromarray(photo).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), photo)


@pytest.mark.parametrize("name", ["gray.png", "gray.jpg"])
def test_grey_gets_three_equal_channels(tmp_path: Path, photo: np.ndarray, decoder: str, name: str) -> None:
    Image.fromarray(photo[..., 0]).save(tmp_path / name)
    pixels = read_image(tmp_path / name)
    assert pixels.shape == (HEIGHT, WIDTH, 3)
    assert np.array_equal(pixels[..., 0], pixels[..., 1])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])
    assert mean_difference(pixels[..., 0], photo[..., 0]) < 2


def test_black_and_white_becomes_0_and_255(tmp_path: Path, photo: np.ndarray) -> None:
    mask = photo[..., 0] > 100
    Image.fromarray(mask).convert("1").save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png"), np.repeat(mask[..., None] * np.uint8(255), 3, axis=2))


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128, 255])])
def test_palettes_become_their_colors_whatever_is_transparent(tmp_path: Path, transparency: int | bytes | None) -> None:
    image = Image.new("P", (WIDTH, HEIGHT))
    image.putpalette([10, 20, 30, 200, 100, 50, 0, 255, 0])
    indices = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH) % 3
    image.putdata(indices.ravel().tolist())
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    colors = np.array([[10, 20, 30], [200, 100, 50], [0, 255, 0]], dtype=np.uint8)
    assert np.array_equal(read_image(tmp_path / "a.png"), colors[indices])


def test_alpha_is_dropped_and_not_composited(tmp_path: Path, photo: np.ndarray) -> None:
    alpha = np.zeros((HEIGHT, WIDTH, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([photo, alpha], axis=2), "RGBA").save(tmp_path / "rgba.png")
    assert np.array_equal(read_image(tmp_path / "rgba.png"), photo)
    gray = np.concatenate([photo[..., :1], alpha], axis=2)
    Image.fromarray(gray, "LA").save(tmp_path / "la.png")
    assert np.array_equal(read_image(tmp_path / "la.png"), np.repeat(photo[..., :1], 3, axis=2))


def test_cmyk_jpegs_of_adobes_inverted_kind_are_read_in_true_colors(
    tmp_path: Path, photo: np.ndarray, decoder: str
) -> None:
    file = tmp_path / "cmyk.jpg"
    Image.fromarray(photo).convert("CMYK").save(file, quality=95)
    assert b"Adobe" in file.read_bytes()
    assert mean_difference(read_image(file), photo) < 3


def test_16_bit_images_are_cut_to_the_upper_8(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
    for name in ("a.png", "a.tif"):
        Image.fromarray(values).save(tmp_path / name)
        pixels = read_image(tmp_path / name)
        assert np.array_equal(pixels, np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2))


def test_orientation_tags_are_ignored(tmp_path: Path, photo: np.ndarray, decoder: str) -> None:
    plain, turned = tmp_path / "plain.jpg", tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(photo).save(plain)
    Image.fromarray(photo).save(turned, exif=exif)
    assert np.array_equal(read_image(turned), read_image(plain))


def test_a_jpeg_in_any_file_name_is_a_jpeg(tmp_path: Path, photo: np.ndarray) -> None:
    Image.fromarray(photo).save(tmp_path / "a.jpg")
    (tmp_path / "b.png").write_bytes((tmp_path / "a.jpg").read_bytes())
    assert np.array_equal(read_image(tmp_path / "b.png"), read_image(tmp_path / "a.jpg"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated_files_are_reported_by_name(
    tmp_path: Path, photo: np.ndarray, decoder: str, format: str, kept: float
) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (100, 120, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    file = tmp_path / "broken.img"
    file.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * kept)])
    with pytest.raises(ImageError, match="broken.img"):
        read_image(file)


def test_a_file_that_is_no_image_or_not_there_is_reported_by_name(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_text("<html>404 not found</html>")
    with pytest.raises(ImageError, match="page.jpg.*no image"):
        read_image(tmp_path / "page.jpg")
    with pytest.raises(ImageError, match="absent.jpg.*No such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


def test_floating_point_images_are_refused_with_a_remedy(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"a\.tif.*'F'.*8-bit"):
        read_image(tmp_path / "a.tif")


def test_images_of_absurd_size_are_refused_before_they_are_decoded(
    tmp_path: Path, photo: np.ndarray, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bomb.jpg"
    Image.fromarray(photo).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 3)
    with pytest.raises(ImageError, match=r"bomb\.jpg.*smaller copy"):
        read_image(file)
