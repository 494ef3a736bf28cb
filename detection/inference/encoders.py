"""What a video file is written with: H.264 by PyAV, which browsers play, or MPEG-4 part 2 by OpenCV where that is missing.

Both take RGB uint8 [H, W, 3] of one size; only ``detection.inference.video.VideoWriter`` uses them.
"""

import importlib
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

H264_ENCODERS = ("libx264", "libopenh264")
"""FFmpeg's names, the best first; which of them are there is the choice of who built it."""


class Encoder(Protocol):
    """A file under way."""

    def write(self, image: NDArray[np.uint8]) -> None:
        """Adds a frame, uint8 RGB [H, W, 3] of the size given at the start."""

    def close(self) -> None:
        """Finishes the file."""


def h264_encoder() -> str | None:
    """FFmpeg's name of an H.264 encoder that PyAV has here; None where there is none, or no PyAV."""
    try:
        av: Any = importlib.import_module("av")
    except ImportError:
        return None
    return next((name for name in H264_ENCODERS if name in av.codecs_available), None)


class H264Encoder:
    """H.264 as every player has it: yuv420p, the index at the file's beginning, the frame rate as an exact fraction.

    Args:
        path: .mp4, .m4v, .mov or .mkv.
        size: (height, width), both even.
        rate: frames per second; 29.97 becomes 30000/1001.
        encoder: from ``h264_encoder``.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float, encoder: str) -> None:
        self._av: Any = importlib.import_module("av")
        moves_index = path.suffix.lower() != ".mkv"
        self._container = self._av.open(str(path), "w", options={"movflags": "faststart"} if moves_index else {})
        try:
            self._stream = self._container.add_stream(encoder, rate=exact_rate(rate))
            self._stream.height, self._stream.width = size
            self._stream.pix_fmt = "yuv420p"
            if encoder == "libx264":
                self._stream.options = {"preset": "veryfast", "crf": "23"}
            else:
                self._stream.bit_rate = max(500_000, round(size[0] * size[1] * rate * 0.1))  # 0.1 bits a pixel
            self._container.start_encoding()  # opens the file, which PyAV would else do at the first frame
        except BaseException:
            self._container.close()
            raise

    def write(self, image: NDArray[np.uint8]) -> None:
        """See ``Encoder``."""
        frame = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        for packet in self._stream.encode(frame):
            self._container.mux(packet)

    def close(self) -> None:
        """See ``Encoder``."""
        try:
            for packet in self._stream.encode(None):
                self._container.mux(packet)
        finally:
            self._container.close()


class OpenCvEncoder:
    """MPEG-4 part 2, which OpenCV's own builds write everywhere, and browsers do not play.

    Args:
        path, size, rate: as for ``H264Encoder``; .avi too.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float) -> None:
        self._writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, (size[1], size[0]))
        if not self._writer.isOpened():
            raise OSError("OpenCV's writer does not open")

    def write(self, image: NDArray[np.uint8]) -> None:
        """See ``Encoder``."""
        self._writer.write(np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2BGR), np.uint8))

    def close(self) -> None:
        """See ``Encoder``."""
        self._writer.release()


def exact_rate(rate: float) -> Fraction:
    """Frames per second as the fraction that is meant: 29.97 -> 30000/1001, 23.976 -> 24000/1001, 12.5 -> 25/2."""
    of_ntsc = Fraction(round(rate * 1.001) * 1000, 1001)
    if of_ntsc and abs(float(of_ntsc) - rate) < 1e-3 and abs(round(rate) - rate) > 1e-6:
        return of_ntsc
    return Fraction(rate).limit_denominator(1001)
