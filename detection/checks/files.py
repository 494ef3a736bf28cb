"""Image files looked at in parallel: what they are, whether they decode, and what tells them apart.

It imports no torch, so that a worker process starts quickly.

Letters in shapes: I images.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.engine.progress import progress_bar
from detection.images.decode import (
    MAX_PIXELS,
    EncodedImage,
    Header,
    MissingImageError,
    UnreadableImageError,
    read_header,
)

THUMB = 9  # side of the thumbnails that near duplicates are told by
_CHUNK = 32  # images that a worker is handed at once
_AHEAD = 8  # chunks for each worker that wait for it or for us
_WORKERS_FROM = 200  # images; fewer are done before a worker has started
_ENOUGH = 64  # pixels of the shorter side that a thumbnail is made of


class Look(NamedTuple):
    """What is known of one file.

    Attributes:
        fault: kind of finding that the file as a whole is, "" where it is a good image.
        message: what the reader said of a fault or of damage.
        header: None where there is none.
        digest: 16 bytes that only equal files share; empty where it was not read whole.
        thumb: uint8 [9, 9] as bytes, the image as it is shown, grey; empty where it was not decoded.
    """

    fault: str = ""
    message: str = ""
    header: Header | None = None
    digest: bytes = b""
    thumb: bytes = b""


@dataclass(slots=True, kw_only=True, eq=False)
class FileTable:
    """The looks at I files, as arrays.

    Attributes:
        faults: kind of finding by image, for the files that are none or do not decode.
        messages: what the reader said, by image: of faults and of damage.
        sizes: int32 [I, 2], (height, width) as stored; 0 where there is no header.
        orientations: int8 [I], EXIF's 1 to 8.
        depths: int16 [I], bits a channel.
        cmyk: bool [I].
        digests: [I] of 16 bytes; empty where the file was not read.
        thumbs: uint8 [I, 9, 9].
        decoded: bool [I], whether there is a thumbnail.
    """

    faults: dict[int, str]
    messages: dict[int, str]
    sizes: NDArray[np.int32]
    orientations: NDArray[np.int8]
    depths: NDArray[np.int16]
    cmyk: NDArray[np.bool_]
    digests: NDArray[np.bytes_]
    thumbs: NDArray[np.uint8]
    decoded: NDArray[np.bool_]

    @classmethod
    def empty(cls, num_images: int) -> FileTable:
        return cls(
            faults={},
            messages={},
            sizes=np.zeros((num_images, 2), np.int32),
            orientations=np.ones(num_images, np.int8),
            depths=np.full(num_images, 8, np.int16),
            cmyk=np.zeros(num_images, np.bool_),
            digests=np.zeros(num_images, "V16"),
            thumbs=np.zeros((num_images, THUMB, THUMB), np.uint8),
            decoded=np.zeros(num_images, np.bool_),
        )

    def header(self, position: int) -> Header:
        """Of an image whose header was read."""
        height, width = self.sizes[position].tolist()
        return Header((height, width), int(self.orientations[position]), "other")

    def _add(self, position: int, look: Look) -> None:
        if look.fault:
            self.faults[position] = look.fault
        if look.message:
            self.messages[position] = look.message
        if look.header is not None:
            self.sizes[position] = look.header.size
            self.orientations[position] = look.header.orientation
            self.depths[position] = look.header.depth
            self.cmyk[position] = look.header.cmyk
        if look.digest:
            self.digests[position] = np.void(look.digest)
        if look.thumb:
            self.thumbs[position] = np.frombuffer(look.thumb, np.uint8).reshape(THUMB, THUMB)
            self.decoded[position] = True


def look_at_file(path: str, pixels: bool = True, max_pixels: int = MAX_PIXELS) -> Look:
    """Looks at one file; whatever is wrong with it is in the answer.

    Args:
        path: of the file.
        pixels: decode it. Without, only its header is read.
        max_pixels: width times height above which it is not decoded.
    """
    header = None
    try:
        image = EncodedImage(path, max_pixels, watch=True)
        header = image.header
        if not pixels:
            return Look(header=header)
        shown = image.decode(_reduction(header.size))
    except MissingImageError as error:
        return Look("missing-image", str(error))
    except UnreadableImageError as error:
        return _judge(path, str(error), max_pixels)
    grey = cv2.cvtColor(shown, cv2.COLOR_RGB2GRAY)
    thumb = np.asarray(cv2.resize(grey, (THUMB, THUMB), interpolation=cv2.INTER_AREA), np.uint8)
    digest = hashlib.blake2b(image.encoded, digest_size=16).digest()
    return Look("", image.damage, header, digest, thumb.tobytes())


def _reduction(size: tuple[int, int]) -> int:
    """The coarsest decoding that still has pixels enough for a thumbnail: a JPEG's whole stream is read in any case."""
    return next((reduction for reduction in (8, 4, 2) if min(size) >= reduction * _ENOUGH), 1)


def _judge(path: str, message: str, max_pixels: int) -> Look:
    """What a file is that is no good image."""
    try:
        encoded = Path(path).read_bytes()
        header = read_header(encoded, whole=False)
    except Exception:  # whatever a decoder makes of something that is no image
        return Look("not-an-image", message)
    fault = "too-large" if header.size[0] * header.size[1] > max_pixels else "truncated-image"
    return Look(fault, message, header)


def look_at_files(
    paths: Sequence[str], *, pixels: bool = True, workers: int | None = None, max_pixels: int = MAX_PIXELS
) -> FileTable:
    """Looks at files in worker processes, with a progress bar on a terminal.

    Args:
        paths: I files.
        pixels, max_pixels: as for ``look_at_file``.
        workers: processes; 0 does it in this one, None takes as many as there are cores where there are files enough.

    Raises:
        UserError: a worker process was killed.
    """
    table = FileTable.empty(len(paths))
    bar = progress_bar(total=len(paths), desc="images" if pixels else "headers", unit="image", leave=False)
    if workers is None:
        workers = (os.cpu_count() or 1) if len(paths) >= _WORKERS_FROM else 0
    with bar:
        for position, look in enumerate(_looks(paths, pixels, workers, max_pixels)):
            table._add(position, look)
            bar.update()
    return table


def _looks(paths: Sequence[str], pixels: bool, workers: int, max_pixels: int) -> Iterator[Look]:
    if workers == 0:
        for path in paths:
            yield look_at_file(path, pixels, max_pixels)
        return
    # Spawned: a fork of a process with torch's threads may wait for a lock that nobody holds any more.
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,))
    try:
        chunks = (paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK))
        tasks = (pool.submit(_look_at_chunk, chunk, pixels, max_pixels) for chunk in chunks)
        waiting = deque(islice(tasks, _AHEAD * workers))
        while waiting:
            looks = waiting.popleft().result()
            waiting.extend(islice(tasks, 1))
            yield from looks
    except BrokenProcessPool:
        raise UserError(
            "a process that reads images was killed, perhaps for want of memory; --workers 1 takes less, --workers 0 none"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _look_at_chunk(paths: Sequence[str], pixels: bool, max_pixels: int) -> list[Look]:
    return [look_at_file(path, pixels, max_pixels) for path in paths]
