"""Videos in and out: a source that is read ahead in a thread, and a file that is written.

Frames are RGB uint8 [H, W, 3]; OpenCV's BGR begins and ends in this file.
"""

import glob
import logging
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np
import supervision as sv
from numpy.typing import NDArray

from backbones.errors import UserError
from backbones.state import write_whole
from detection.images.decode import IMAGE_SUFFIXES, read_image
from detection.inference.encoders import Encoder, H264Encoder, OpenCvEncoder, h264_encoder

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4")
IMAGES_PER_SECOND = 2.0  # the rate of a folder of images
USUAL_RATE = 30.0  # frames per second of a camera that does not tell its own
STREAM_TIMEOUT = 10.0  # seconds without a word from a stream after which it has ended


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame of a source.

    Attributes:
        image: uint8 RGB [H, W, 3].
        index: 0, 1, 2, ... in the order of the source. Where a live source is faster than its reader, numbers are missing.
        time: seconds since the first frame given; of a live source by the clock, of a file by its time stamps.
        name: file name of the image, in a folder of images; else None.
    """

    image: NDArray[np.uint8]
    index: int
    time: float
    name: str | None = None


class FrameReader:
    """Reads a source ahead in a thread, so that decoding and detection run side by side.

    A file waits for its reader: every frame is given. A camera or a live stream does not wait: a frame that was not
    fetched when the next one comes is dropped, so the image never lags behind.

    with FrameReader("video.mp4") as reader:
        for frame in reader: ...

    Args:
        source: a video file, an image, a folder of images, a pattern (``shots/*.jpg``), the number of a camera, or the URL
            of a stream.
        read_ahead: frames that a file may be ahead of its reader.

    Attributes:
        rate: frames per second of the source.
        size: (height, width) of its first frame. Images of a folder may differ.
        num_frames: frames in it, as its header says; None where nobody knows.
        live: whether it goes on without waiting.
        num_read: frames given so far.
        num_dropped: frames of a live source that nobody fetched in time.
        skipped: "path: reason" of every image of a folder that could not be read.

    Raises:
        FileNotFoundError: no such file, or a folder without images.
        OSError: it is there but cannot be read: no video, no camera of this number, no answer from the stream.
    """

    def __init__(self, source: str | Path, read_ahead: int = 8) -> None:
        self.source = str(source)
        self.num_frames: int | None = None
        self.live = False
        self.num_read = 0
        self.num_dropped = 0
        self.skipped: list[str] = []
        self._broke: str | None = None
        if _is_camera(self.source) or "://" in self.source or _is_video(self.source):
            frames = self._open_video()
        else:
            frames = self._open_images()
        first = next(frames, None)
        if first is None:
            reason = self._broke or (f"the first: {self.skipped[0]}" if self.skipped else "it holds no image")
            raise OSError(f"{self.source}: not one frame could be read ({reason})")
        height, width = first.image.shape[:2]
        self.size = (height, width)

        self._queue: deque[Frame] = deque([first])
        self._read_ahead = max(1, read_ahead)
        self._changed = threading.Condition()
        self._ended = self._closing = self._exhausted = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._fill, args=(frames,), name="FrameReader", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> str | None:
        """Why the source ended before its time, once its last frame was given; None where all is well."""
        if not self._exhausted:
            return None
        if self._broke:
            return f"broke off after {self.num_read} frames: {self._broke}"
        # Headers of some formats give the number only roughly, from duration and rate.
        if self.num_frames is not None and not self.skipped and self.num_read < 0.99 * self.num_frames - 1:
            return f"ended after {self.num_read} of {self.num_frames} frames: the file is cut off or damaged"
        return None

    def __iter__(self) -> Iterator[Frame]:
        begin: float | None = None
        while True:
            with self._changed:
                while not self._queue and not self._ended:
                    self._changed.wait()
                if not self._queue:
                    self._exhausted = not self._closing
                    break
                frame = self._queue.popleft()
                self._changed.notify_all()
            if self.live:
                begin = frame.time if begin is None else begin
                frame = replace(frame, time=frame.time - begin)
            self.num_read += 1
            yield frame
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stops the thread and lets go of the source. Frames not yet fetched are lost."""
        with self._changed:
            self._closing = True
            self._queue.clear()
            self._changed.notify_all()
        self._thread.join(timeout=STREAM_TIMEOUT + 1)  # a thread waiting for a silent stream ends with that wait

    def __enter__(self) -> "FrameReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self, frames: Generator[Frame, None, None]) -> None:
        try:
            for frame in frames:
                with self._changed:
                    if self.live and self._queue:
                        self._queue.popleft()
                        self.num_dropped += 1
                    while len(self._queue) >= self._read_ahead and not self._closing:
                        self._changed.wait()
                    if self._closing:
                        break
                    self._queue.append(frame)
                    self._changed.notify_all()
        except Exception as error:  # raised again by whoever reads
            self._error = error
        finally:
            frames.close()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _open_video(self) -> Generator[Frame, None, None]:
        capture = _capture(self.source)
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        if count > 0 and not _is_camera(self.source):
            self.num_frames = int(count)
        else:
            self.live = True
        rate = capture.get(cv2.CAP_PROP_FPS)
        self.rate = rate if 0 < rate <= 1000 else USUAL_RATE  # some files say 90000, the unit of their clock

        def frames() -> Generator[Frame, None, None]:
            index, last = 0, -1 / self.rate
            try:
                while True:
                    there, image = capture.read()
                    if not there:
                        self._broke = "the stream ended" if self.live else None
                        return
                    if self.live:
                        now = time.monotonic()
                    else:
                        now = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                        now = now if now > last else last + 1 / self.rate
                    yield Frame(np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), np.uint8), index, now)
                    index, last = index + 1, now
            except cv2.error as error:
                self._broke = " ".join(str(error).split())
            finally:
                capture.release()

        return frames()

    def _open_images(self) -> Generator[Frame, None, None]:
        path = Path(self.source)
        if path.is_dir():
            paths = [one for one in path.iterdir() if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
            paths.sort(key=_natural_order)
            if not paths:
                raise FileNotFoundError(f"{path}: no images in this folder ({', '.join(IMAGE_SUFFIXES)})")
        elif path.exists():
            paths = [path]
        elif glob.has_magic(self.source):
            paths = [Path(one) for one in glob.glob(self.source, recursive=True)]
            paths = [one for one in paths if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
            paths.sort(key=_natural_order)
            if not paths:
                raise FileNotFoundError(f"{self.source}: no image fits this pattern ({', '.join(IMAGE_SUFFIXES)})")
        else:
            raise FileNotFoundError(
                f"{path}: no such file or folder; a source is a video, an image, a folder of images, "
                "a pattern ('shots/*.jpg'), the number of a camera (0 is the first) or the URL of a stream"
            )
        self.num_frames = len(paths)
        self.rate = IMAGES_PER_SECOND

        def frames() -> Generator[Frame, None, None]:
            index = 0
            for one in paths:
                try:
                    image = read_image(one)
                except (OSError, ValueError) as error:
                    self.skipped.append(str(error))
                    continue
                yield Frame(image, index, index / self.rate, one.name)
                index += 1

        return frames()


class VideoWriter:
    """Writes frames to a video file: H.264 where PyAV has an encoder of it, else MPEG-4 part 2 by OpenCV, with a warning.

    It takes RGB, fits frames of another size, keeps the clock of a live source and finds out at the end whether everything
    is on the disk: OpenCV itself loses frames of another size, and frames that a full disk cannot take, without a word.

    Args:
        path: the suffix gives the format: .mp4, .mov, .m4v or .mkv, and .avi, which is always MPEG-4 part 2. The folder is
            made if it is not there.
        size: (height, width) of the video. These codecs have even sides only: an odd one loses its last row or column.
        rate: frames per second.

    Attributes:
        num_frames: frames written.
        codec: "H.264" or "MPEG-4 part 2".

    Raises:
        UserError: a suffix that no format here has.
        OSError: the file cannot be written, now or, from ``close``, before the end.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], rate: float) -> None:
        self.path = Path(path)
        self.size = size
        self.rate = rate
        self.num_frames = 0
        suffix = self.path.suffix.lower()
        if suffix not in VIDEO_SUFFIXES:
            raise UserError(f"{path}: a video is written as one of {', '.join(VIDEO_SUFFIXES)}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._even = (size[0] // 2 * 2, size[1] // 2 * 2)
        h264 = None if suffix == ".avi" else h264_encoder()
        if h264 is None and suffix != ".avi":
            _log.warning(
                "no H.264 encoder here (pip install av): %s is MPEG-4 part 2, which browsers do not play", path
            )
        self.codec = "H.264" if h264 else "MPEG-4 part 2"
        self._encoder: Encoder | None = None
        try:
            with _quiet_opencv():
                if h264:
                    self._encoder = H264Encoder(self.path, self._even, rate, h264)
                else:
                    self._encoder = OpenCvEncoder(self.path, self._even, rate)
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path}: the video cannot be written ({size[1]} x {size[0]}, {rate:g} frames/s); is it writable?"
            ) from error

    def write(self, image: NDArray[np.uint8], time: float | None = None) -> None:
        """Adds a frame.

        Args:
            image: uint8 RGB [H, W, 3]. One of another size than the video is fitted into it, its sides in proportion.
            time: seconds since the first frame, for a source that drops frames: the video repeats this one until it has
                caught up with the clock, and leaves it out where it is ahead. None: one frame each.

        Raises:
            OSError: the disk does not take it.
        """
        assert self._encoder is not None, "the file is closed"
        if image.shape[:2] != self.size:
            image = np.asarray(sv.letterbox_image(image, (self.size[1], self.size[0])), np.uint8)
        image = image[: self._even[0], : self._even[1]]
        for _ in range(1 if time is None else round(time * self.rate) + 1 - self.num_frames):
            self._encoder.write(image)
            self.num_frames += 1

    def close(self) -> None:
        """Finishes the file and reads its header back.

        Raises:
            OSError: frames are missing in it.
        """
        if self._encoder is None:
            return
        encoder, self._encoder = self._encoder, None
        encoder.close()
        with _quiet_opencv():
            check = cv2.VideoCapture(str(self.path))
            held = int(check.get(cv2.CAP_PROP_FRAME_COUNT)) if check.isOpened() else 0
            check.release()
        if held < self.num_frames - 1:  # not every format keeps the exact number
            raise OSError(f"{self.path}: {held} of {self.num_frames} frames are in the file; is the disk full?")

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._encoder is not None:
            with suppress(OSError):  # the error under way says more
                self._encoder.close()
            self._encoder = None


class ImageWriter:
    """Writes frames as images to a folder: under the name of their file, or frame_000012.jpg for those of a video.

    Two files of one name, which a pattern over several folders gives, become NAME and NAME_2.

    Args:
        folder: made if it is not there. Images in it of the same names are replaced.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._given: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, image: NDArray[np.uint8], frame: Frame) -> Path:
        """Writes RGB uint8 [H, W, 3], whole or not at all, and returns where: PNG for a PNG, JPEG for all others."""
        stem = Path(frame.name).stem if frame.name else f"frame_{frame.index:06}"
        suffix = ".png" if frame.name and frame.name.lower().endswith(".png") else ".jpg"
        name, number = stem + suffix, 1
        while name in self._given:
            number += 1
            name = f"{stem}_{number}{suffix}"
        self._given.add(name)
        _, encoded = cv2.imencode(suffix, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
        write_whole(self.folder / name, encoded.tobytes())
        return self.folder / name


def write_video(path: str | Path, images: Iterable[NDArray[np.uint8]], rate: float) -> int:
    """Writes uint8 RGB images as a video of the first one's size and returns their number.

    Raises:
        UserError: there is no image; see also ``VideoWriter``.
        OSError: see ``VideoWriter``.
    """
    iterator = iter(images)
    first = next(iterator, None)
    if first is None:
        raise UserError(f"{path}: a video needs at least one image")
    height, width = first.shape[:2]
    with VideoWriter(path, (height, width), rate) as video:
        video.write(first)
        for image in iterator:
            video.write(image)
    return video.num_frames


def _is_camera(source: str) -> bool:
    return source.isdecimal()


def _is_video(source: str) -> bool:
    return Path(source).is_file() and Path(source).suffix.lower() not in IMAGE_SUFFIXES


def _natural_order(path: Path) -> list[tuple[int, str]]:
    """2.jpg before 10.jpg."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name.lower())]


def _capture(source: str) -> cv2.VideoCapture:
    with _quiet_opencv():
        if _is_camera(source):
            capture = cv2.VideoCapture(int(source))
        elif "://" in source:
            limit = int(STREAM_TIMEOUT * 1000)
            limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
            capture = cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)
        else:
            capture = cv2.VideoCapture(source)
    if capture.isOpened():
        return capture
    if _is_camera(source):
        there = sorted(str(device) for device in Path("/dev").glob("video*")) if sys.platform == "linux" else []
        listed = f" (in /dev: {', '.join(there) or 'no video device'})" if sys.platform == "linux" else ""
        raise OSError(f"camera {source} does not open: not there, in use, or not permitted{listed}")
    if "://" in source:
        raise OSError(
            f"{source}: the stream does not open: wrong address, no answer in {STREAM_TIMEOUT:g} s, or no video"
        )
    raise OSError(f"{source}: not a video that OpenCV can read: damaged, cut off, or of another kind")


@contextmanager
def _quiet_opencv() -> Iterator[None]:
    """Keeps OpenCV and FFmpeg from writing pages to stderr about a file that does not open: the error raised says it."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    # OpenCV 5 has it in a module of its own. Both give the level before.
    set_level = cv2.setLogLevel if hasattr(cv2, "setLogLevel") else cv2.utils.logging.setLogLevel
    before = set_level(0)  # silent
    try:
        yield
    finally:
        set_level(before)
