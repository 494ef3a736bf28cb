import os
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detection.images import decode
from detection.images.decode import (
    IMAGE_SUFFIXES,
    EncodedImage,
    Header,
    MissingImageError,
    UnreadableImageError,
    read_header,
    read_image,
)

SIZES = [(40, 60), (60, 40), (48, 48)]


def draw(size: tuple[int, int]) -> NDArray[np.uint8]:
    """Dark, with a bright rectangle in the upper left that is not square."""
    image = np.full((*size, 3), 20, np.uint8)
    image[:8, :16] = 230
    return image


def encode(image: NDArray[np.uint8], kind: str, orientation: int = 1) -> bytes:
    exif, file = Image.Exif(), BytesIO()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP") else {}
    Image.fromarray(image).save(file, kind, exif=exif, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations(tmp_path: Path, orientation: int, size: tuple[int, int], kind: str) -> None:
    content = encode(draw(size), kind, orientation)
    (tmp_path / "a").write_bytes(content)
    image = EncodedImage(tmp_path / "a")
    with Image.open(BytesIO(content)) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    assert image.header[:2] == (size, orientation)
    assert image.header.shown_size == expected.shape[:2]
    stored, shown = image.decode(turn=False), image.decode()
    assert np.abs(stored.astype(int) - draw(size)).mean() < 3
    assert np.abs(shown.astype(int) - expected).mean() < 3
    assert shown.flags.c_contiguous
    np.testing.assert_array_equal(read_image(tmp_path / "a"), shown)
    small = image.decode(4)
    assert small.shape[:2] == tuple(side // 4 for side in shown.shape[:2])
    whole = cv2.resize(shown, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - whole).mean() < 4


@pytest.mark.parametrize("orientation", [0, 9, 300])
def test_an_orientation_without_meaning_turns_nothing(orientation: int) -> None:
    assert read_header(encode(draw((40, 60)), "JPEG", orientation)) == Header((40, 60), 1, "jpeg")


def test_damaged_exif_makes_no_image_unreadable() -> None:
    content = bytearray(encode(draw((40, 60)), "JPEG", 6))
    start = content.index(b"Exif\0\0") + 6
    content[start : start + 12] = b"\xff" * 12
    assert read_header(bytes(content)) == Header((40, 60), 1, "jpeg")


def test_exif_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    content = encode(draw((40, 60)), "PNG", 6)
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    last = content.index(b"IEND") - 4
    (tmp_path / "a.png").write_bytes(content[:start] + content[end:last] + content[start:end] + content[last:])
    assert read_image(tmp_path / "a.png").shape == (60, 40, 3)


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that says it is large."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_large_image_is_refused_by_its_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "imdecode", None)  # it must not come to that
    (tmp_path / "a.png").write_bytes(png_header(40_000, 30_000))
    with pytest.raises(
        UnreadableImageError, match=r"a.png: the image is 40000x30000 pixels, 1200 million; at most 179"
    ):
        read_image(tmp_path / "a.png")
    (tmp_path / "a.jpg").write_bytes(encode(draw((40, 60)), "JPEG"))
    with pytest.raises(UnreadableImageError, match="60x40 pixels"):
        read_image(tmp_path / "a.jpg", max_pixels=2399)
    file = BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "TIFF", compression="group4")  # above Pillow's own limit
    (tmp_path / "a.tif").write_bytes(file.getvalue())
    with pytest.raises(UnreadableImageError, match=r"a.tif: the image has too many pixels"):
        read_image(tmp_path / "a.tif", max_pixels=1 << 40)


def test_an_error_of_opencv_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_header(40_000, 40_000))  # more than OpenCV takes: it raises
    with pytest.raises(UnreadableImageError, match=r"a.png: the image does not decode"):
        read_image(tmp_path / "a.png", max_pixels=1 << 40)


@pytest.mark.parametrize(("top", "expected"), [(65535, 255), (4096, 16), (4095, 255), (1000, 62)])
def test_sixteen_bits(tmp_path: Path, top: int, expected: int) -> None:
    image = np.zeros((8, 8), np.uint16)
    image[2:4] = top
    cv2.imwrite(str(tmp_path / "a.png"), image)
    assert read_image(tmp_path / "a.png").max() == expected


def test_float_pixels_are_refused(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "a.tif"), np.zeros((8, 8), np.float32))
    with pytest.raises(UnreadableImageError, match=r"a.tif: the "):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.98])
def test_an_image_that_is_cut_off(tmp_path: Path, kind: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    content = encode(noise, kind)
    (tmp_path / "a").write_bytes(content[: int(share * len(content))])
    with pytest.raises(UnreadableImageError, match=r"a: the image does not decode \(\d+ bytes\)"):
        read_image(tmp_path / "a")


def test_a_jpeg_whose_end_is_zeros_or_has_a_tail(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    content = encode(noise, "JPEG")
    half = len(content) // 2
    (tmp_path / "a").write_bytes(content[:half] + bytes(half))
    with pytest.raises(UnreadableImageError):
        read_image(tmp_path / "a")
    (tmp_path / "a").write_bytes(content + b"what a telephone appends")
    assert read_image(tmp_path / "a").shape == (60, 80, 3)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_used_and_named(
    tmp_path: Path, progressive: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    buffer = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", progressive=progressive)
    whole = buffer.getvalue()
    (tmp_path / "whole").write_bytes(whole)
    expected = read_image(tmp_path / "whole")
    for lost, padding in [(2, 0), (2, 300), (3, 0)]:  # the marker, the marker overwritten by zeros, one byte more
        (tmp_path / "a").write_bytes(whole[:-lost] + bytes(padding))
        image = EncodedImage(tmp_path / "a", watch=True)
        assert image.header.size == (120, 160)
        assert (image.decode() != expected).any(-1).mean() < (0.01 if lost > 2 else 1e-9)
        assert image.damage.startswith("JPEG without its end marker")
        image.decode(2)
        assert image.damage.count("without its end marker") == 1
    for lost in (len(whole) // 20, len(whole) // 3):
        (tmp_path / "a").write_bytes(whole[:-lost])
        with pytest.raises(UnreadableImageError, match="does not decode"):
            EncodedImage(tmp_path / "a")
    assert capfd.readouterr().err == ""


def test_what_is_no_image_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # opening it would wait for a writer
    with pytest.raises(UnreadableImageError, match=r"pipe.jpg: a pipe, a socket or a device, not an image file"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(UnreadableImageError, match="a folder, not an image file"):
        read_image(tmp_path)
    with pytest.raises(UnreadableImageError, match="is no file name"):
        read_image("a\0b.jpg")
    with pytest.raises(MissingImageError, match=r"gone.jpg: No such file") as error:
        read_image(tmp_path / "gone.jpg")
    assert isinstance(error.value, FileNotFoundError)


def test_every_suffix_is_read(tmp_path: Path) -> None:
    for suffix in IMAGE_SUFFIXES:
        path = tmp_path / f"a{suffix}"
        Image.fromarray(draw((40, 60))).convert("L" if suffix == ".pgm" else "RGB").save(path)
        assert read_image(path).shape == (40, 60, 3)
        assert torch.from_numpy(read_image(path)).dtype == torch.uint8


def test_damage_in_the_middle_of_a_jpeg_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = encode(np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8), "JPEG")
    damaged = whole[: len(whole) * 3 // 4] + b"\xff\xd9"  # the scan breaks off, the end is there
    (tmp_path / "a.jpg").write_bytes(damaged)
    image = EncodedImage(tmp_path / "a.jpg", watch=True)
    assert image.damage == ""
    assert image.decode().shape == (48, 64, 3)
    assert image.damage.startswith("Corrupt JPEG data: premature end of data segment")
    assert capfd.readouterr().err == ""  # told by whoever asked, not by the library

    (tmp_path / "a.jpg").write_bytes(whole)
    image = EncodedImage(tmp_path / "a.jpg", watch=True)
    image.decode()
    assert image.damage == ""
    os.write(2, b"still here\n")
    assert capfd.readouterr().err == "still here\n"


def test_what_others_print_meanwhile_is_not_lost(capfd: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with decode._listening(said, True):
        os.write(2, b"CUDA says something\nCorrupt JPEG data: 3 extraneous bytes\n")
    assert said == ["CUDA says something", "Corrupt JPEG data: 3 extraneous bytes"]
    assert capfd.readouterr().err == "CUDA says something\n"
