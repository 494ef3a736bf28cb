"""Image files as pixels: the one reader for training, evaluation, prediction and conversion.

* Suffixes: ``IMAGE_SUFFIXES``. What a file is, its content decides.
* EXIF: a camera held upright often stores its image lying, with a tag that says how to turn it. ``read_image`` turns; who
  has annotations asks ``EncodedImage`` for the pixels that these count in, "as shown" (turned) or "as stored".
* Limits: the size is read from the header, and an image above ``MAX_PIXELS`` is refused before anything is decoded. Only
  regular files are opened (a pipe would wait for ever).
* Depth: of 16 bits a channel the upper eight are taken. Where no value needs more than twelve bits they are taken as
  twelve, as scanners and industrial cameras write them; the image would be all but black otherwise.
* Damage: what does not decode, and a JPEG or PNG that is cut off, is unreadable. A JPEG that lacks its end marker and at most
  a hundredth of its pixels is used and counts as damaged. Damage in the middle of a JPEG shows in nothing but wrong pixels
  and a line of libjpeg's on the error stream, which ``EncodedImage(watch=True)`` catches.
"""

import os
import stat
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbones.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
MAX_PIXELS = 178_956_970
"""Width times height of the largest image that is decoded: half a gigabyte of RGB, where Pillow draws the line too."""

_ORIENTATION = 0x0112  # EXIF's tag
_JPEG_END = b"\xff\xd9"
_ENDLESS = "JPEG without its end marker"
_MOST_MISSING = 0.01  # share of the pixels that a JPEG without its end marker may lack
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# Start-of-frame markers of JPEG: C0 to CF without DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ALONE = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a length: TEM and RST0 to RST7


class UnreadableImageError(UserError):
    """An image that does not decode, is too large, or is not the one its annotation speaks of. The message names it."""


class MissingImageError(UnreadableImageError, FileNotFoundError):
    """An image file that is not there."""


class Header(NamedTuple):
    """What an image file says of itself before it is decoded.

    Attributes:
        size: (height, width) of the pixels as stored.
        orientation: EXIF's 1 to 8; 1 where the file says nothing, or nothing sensible.
        kind: "jpeg", "png", "tiff" or "other".
        depth: bits of a channel.
        cmyk: whether the channels are the four of printing; decoded they become RGB by a rough rule.
    """

    size: tuple[int, int]
    orientation: int
    kind: str
    depth: int = 8
    cmyk: bool = False

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) of the image turned as its EXIF tag says."""
        return self.size[::-1] if self.orientation >= 5 else self.size


class EncodedImage:
    """The bytes of an image file, its header read, to be decoded at the size and the way up that is asked for.

    Args:
        path: the file.
        max_pixels: width times height above which it is refused.
        watch: listen to what the JPEG library says of damage. For one thread at a time: what other threads print
            meanwhile on the error stream is printed a moment later.

    Attributes:
        encoded: the file's bytes.
        header: size as stored and orientation.
        damage: what is wrong with a JPEG that is used all the same: its end marker is missing, or what the JPEG library
            said while it was decoded; "" where there was nothing, or nobody listened.

    Raises:
        MissingImageError: no such file.
        UnreadableImageError: no regular file, too large, cut off, or its header makes no sense.
    """

    def __init__(self, path: str | Path, max_pixels: int = MAX_PIXELS, *, watch: bool = False) -> None:
        self.path = path
        self.damage = ""
        self._watch = watch
        self.encoded = _read_bytes(path)
        self._endless = False
        try:
            try:
                self.header = read_header(self.encoded)
            except _EndlessJpegError as error:
                self.header, self._endless = error.header, True
        except _TooLargeError:
            raise UnreadableImageError(
                f"{path}: the image has too many pixels for Pillow, which reads its size"
            ) from None
        except Exception as error:  # whatever a decoder makes of a damaged file
            raise self._undecodable() from error
        height, width = self.header.size
        if height * width > max_pixels:
            raise UnreadableImageError(
                f"{path}: the image is {width}x{height} pixels, {height * width / 1e6:.0f} million; "
                f"at most {max_pixels / 1e6:.0f} million are decoded"
            )
        if self._endless:
            ended = _end(self.encoded)
            if ended is None:
                raise self._undecodable()
            self.encoded, self.damage = ended, _ENDLESS

    def decode(self, reduction: int = 1, *, turn: bool = True) -> NDArray[np.uint8]:
        """The image, or a smaller one, which a JPEG decodes to in a fraction of the time.

        Args:
            reduction: 1, 2, 4 or 8: each side is divided by it and rounded up.
            turn: as its EXIF tag says; False gives the pixels as stored.

        Returns:
            RGB uint8 [H, W, 3], contiguous.

        Raises:
            UnreadableImageError: it does not decode.
        """
        header = self.header
        flags = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        if header.kind == "jpeg":
            image = self._decode(flags | _REDUCED[reduction])
            scale = reduction
        else:
            image = _to_uint8(self._decode(flags | cv2.IMREAD_ANYDEPTH), self.path)
            scale = 1
            if header.kind == "tiff":  # OpenCV turns these whatever it is told
                image = _turn(image, {6: 8, 8: 6}.get(header.orientation, header.orientation))
        if image.shape[:2] != (-(-header.size[0] // scale), -(-header.size[1] // scale)):
            height, width = image.shape[:2]
            raise UnreadableImageError(
                f"{self.path}: decodes to {width}x{height} pixels, its header says {header.size[1]}x{header.size[0]}"
            )
        if turn:
            image = _turn(image, header.orientation)
        if scale != reduction:  # other formats are decoded whole and then made smaller, which saves no time
            height, width = (-(-side // reduction) for side in image.shape[:2])
            image = np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
        return image

    def _decode(self, flags: int) -> NDArray[np.uint8]:
        said: list[str] = []
        with _listening(said, self._watch and self.header.kind == "jpeg"):
            try:
                image = cv2.imdecode(np.frombuffer(self.encoded, np.uint8), flags)
            except (cv2.error, MemoryError):
                image = None
        heard = [line for line in said if "JPEG" in line.upper()]
        self.damage = "; ".join(dict.fromkeys([*([_ENDLESS] if self._endless else []), *heard]))
        if image is None:
            raise self._undecodable()
        return np.asarray(image)

    def _undecodable(self) -> UnreadableImageError:
        return UnreadableImageError(f"{self.path}: the image does not decode ({len(self.encoded)} bytes)")


_one_listens = threading.Lock()
_heard: dict[int, int] = {}  # process -> descriptor of the file that stands in for its error stream


@contextmanager
def _listening(said: list[str], listen: bool) -> Iterator[None]:
    """Collects the lines that C libraries print on the error stream; those that are not of a JPEG are printed afterwards.

    Where another thread listens already, or the process has no error stream, nothing is collected. It costs four system
    calls, microseconds.
    """
    if not listen or not _one_listens.acquire(blocking=False):
        yield
        return
    try:
        try:
            stream = os.dup(2)
        except OSError:
            yield
            return
        file = _heard.get(os.getpid())
        if file is None:  # after a fork, too: the two would share a position in the file
            with tempfile.TemporaryFile() as temporary:
                file = _heard[os.getpid()] = os.dup(temporary.fileno())
        os.dup2(file, 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            size = os.fstat(file).st_size
            if size:
                os.lseek(file, 0, os.SEEK_SET)
                lines = os.read(file, size).decode(errors="replace").splitlines()
                os.ftruncate(file, 0)
                os.lseek(file, 0, os.SEEK_SET)
                said += lines
                if other := [line for line in lines if "JPEG" not in line.upper()]:
                    os.write(stream, ("\n".join(other) + "\n").encode())
            os.close(stream)
    finally:
        _one_listens.release()


def read_image(path: str | Path, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """An image file as it is shown: RGB uint8 [H, W, 3], turned as its EXIF tag says.

    Raises:
        MissingImageError: no such file; it is a FileNotFoundError.
        UnreadableImageError: no regular file, above ``max_pixels``, or it does not decode; it is a UserError.
    """
    return EncodedImage(path, max_pixels).decode()


def read_header(encoded: bytes, *, whole: bool = True) -> Header:
    """Size and orientation of an encoded image.

    JPEG and PNG are read here: Pillow takes 130 us to open a JPEG, a fifth of the time that decoding it at half its size
    takes, and this takes 10. All other formats are Pillow's.

    Args:
        encoded: the file, or its beginning.
        whole: look for the end of a JPEG or PNG.

    Raises:
        Exception: of any kind, for a file that is no image, or is cut off.
    """
    if encoded[:2] == b"\xff\xd8":
        return _jpeg_header(encoded, whole)
    if encoded[:8] == b"\x89PNG\r\n\x1a\n":
        return _png_header(encoded, whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the caller has a limit of its own
        try:
            with Image.open(BytesIO(encoded)) as image:
                if image.format == "TIFF":
                    tags = image.tag_v2
                    depth, cmyk = max(tags.get(258, (1,))), tags.get(262) == 5
                    return Header((tags[257], tags[256]), _sensible(tags.get(_ORIENTATION)), "tiff", depth, cmyk)
                depth = 16 if image.mode.startswith("I") else 8
                return Header((image.height, image.width), _orientation(image.info.get("exif")), "other", depth)
        except Image.DecompressionBombError as error:
            raise _TooLargeError from error


class _TooLargeError(Exception):
    pass


class _EndlessJpegError(ValueError):
    """A JPEG that has a scan and no end marker behind it; ``header`` is its header."""

    def __init__(self, header: Header) -> None:
        super().__init__("cut off")
        self.header = header


def _end(endless: bytes) -> bytes | None:
    """A JPEG without its end marker, ended; None where it lacks more than ``_MOST_MISSING`` of its pixels.

    libjpeg does not say where the data end, and paints what is missing. So the file is decoded twice, with nothing and with
    noise in the place of what is missing: the pixels that differ are those that hang on it.
    """
    data = endless.rstrip(b"\0")  # what a broken copy leaves; zeros decode as pixels
    noise = np.random.default_rng(0).integers(0, 255, len(data), np.uint8).tobytes()  # no 255, which begins a marker
    with _listening([], True):  # that data are missing is known
        try:
            one, other = (
                cv2.imdecode(np.frombuffer(data + tail + _JPEG_END, np.uint8), cv2.IMREAD_COLOR)
                for tail in (b"", noise)
            )
        except (cv2.error, MemoryError):
            return None
    if one is None or other is None or one.shape != other.shape:
        return None
    return data + _JPEG_END if (one != other).any(-1).mean() <= _MOST_MISSING else None


def _read_bytes(path: str | Path) -> bytes:
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
            raise UnreadableImageError(f"{path}: {what}, not an image file")
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise MissingImageError(f"{path}: {error.strerror}") from None
    except OSError as error:
        raise UnreadableImageError(f"{path}: {error.strerror or error}") from None
    except UnreadableImageError:
        raise
    except ValueError as error:  # a zero byte in the name
        raise UnreadableImageError(f"{os.fspath(path)!r} is no file name: {error}") from None


def _jpeg_header(data: bytes, whole: bool) -> Header:
    """From marker to marker up to the first scan; then the end has to be there (ITU T.81, annex B)."""
    size, orientation, place, depth, channels = None, 1, 2, 8, 3
    while True:
        while data[place] == 0xFF:  # any number of them may stand before a marker
            place += 1
        marker = data[place]
        place += 1
        if marker in _ALONE:
            continue
        length = data[place] << 8 | data[place + 1]
        if marker in _FRAMES:
            depth, channels = data[place + 2], data[place + 7]
            size = data[place + 3] << 8 | data[place + 4], data[place + 5] << 8 | data[place + 6]
        elif marker == 0xE1 and data[place + 2 : place + 8] == b"Exif\0\0":
            orientation = _orientation(data[place + 2 : place + length])
        elif marker == 0xDA:
            break
        place = data.index(0xFF, place + max(length, 2))
    if size is None or not all(size):
        raise ValueError("cut off")
    header = Header(size, orientation, "jpeg", depth, channels == 4)
    # FF D9 can stand in a thumbnail of the header, but not inside of a scan.
    if whole and data.rfind(_JPEG_END, place) < 0:
        raise _EndlessJpegError(header)
    return header


def _png_header(data: bytes, whole: bool) -> Header:
    """From chunk to chunk: EXIF may stand behind the pixels (PNG, third edition, 5.3 and 11.3.4.4)."""
    if data[12:16] != b"IHDR":
        raise ValueError("no header")
    size = int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")
    orientation, place = 1, 8
    while (kind := data[place + 4 : place + 8]) != b"IEND":
        length = int.from_bytes(data[place : place + 4], "big")
        if kind == b"eXIf":
            orientation = _orientation(data[place + 8 : place + 8 + length])
        place += length + 12
        if place >= len(data):
            if not whole:
                break
            raise ValueError("cut off")
    return Header(size, orientation, "png", data[24])


def _orientation(exif: bytes | None) -> int:
    """The orientation that a block of EXIF data asks for."""
    if not exif:
        return 1
    tags = Image.Exif()
    try:
        tags.load(exif)
        return _sensible(tags.get(_ORIENTATION))
    except Exception:  # damaged EXIF does not make an image unreadable
        return 1


def _sensible(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1


def _turn(image: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """An image as stored, turned and mirrored to how it is shown (EXIF 2.32, 4.6.4, Orientation)."""
    if orientation == 1:
        return image
    if orientation in (2, 3, 4):
        turned = cv2.flip(image, {2: 1, 3: -1, 4: 0}[orientation])
    elif orientation == 5:
        turned = cv2.transpose(image)
    elif orientation == 7:
        turned = cv2.flip(cv2.transpose(image), -1)
    else:
        turned = cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE if orientation == 6 else cv2.ROTATE_90_COUNTERCLOCKWISE)
    return np.asarray(turned, np.uint8)


def _to_uint8(image: NDArray[np.generic], path: str | Path) -> NDArray[np.uint8]:
    if image.dtype == np.uint16:
        twelve = int(image.max(initial=0)) < 1 << 12
        return (image >> (4 if twelve else 8)).astype(np.uint8)  # type: ignore[operator]
    if image.dtype != np.uint8:
        raise UnreadableImageError(f"{path}: the pixels are {image.dtype}; 8 or 16 bits a channel are read")
    return image  # type: ignore[return-value]
