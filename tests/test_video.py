import subprocess
import sys
import threading
import time
from collections.abc import Generator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from shared_data import SHARED, needs_shared

from detection.inference import video
from detection.inference.encoders import exact_rate
from detection.inference.video import Frame, FrameReader, VideoWriter, write_video


def coloured(number: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A red image, brighter with its number."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 20 + 10 * number
    return image


def drawn_video(path: Path, num_frames: int, rate: float = 12.5) -> Path:
    write_video(path, (coloured(number) for number in range(num_frames)), rate)
    return path


class Camera:
    """Stands for cv2.VideoCapture of a camera that gives a frame every ``pause`` seconds and ends after ``count``."""

    def __init__(self, count: int, pause: float = 0.0, rate: float = 0.0) -> None:
        self.left, self.pause, self.rate = count, pause, rate
        self.released = False

    def get(self, what: int) -> float:
        return {cv2.CAP_PROP_FPS: self.rate, cv2.CAP_PROP_FRAME_COUNT: -1.0}[what]

    def read(self) -> tuple[bool, np.ndarray | None]:
        time.sleep(self.pause)
        self.left -= 1
        return (True, np.zeros((48, 64, 3), np.uint8)) if self.left >= 0 else (False, None)

    def release(self) -> None:
        self.released = True


def no_readers() -> bool:
    return not any(thread.name == "FrameReader" for thread in threading.enumerate())


def test_video_comes_back_as_it_was_written(tmp_path: Path):
    path = drawn_video(tmp_path / "new folder" / "video.mp4", 20)
    with FrameReader(path) as reader:
        assert (reader.size, reader.rate, reader.num_frames, reader.live) == ((48, 64), 12.5, 20, False)
        frames = list(reader)
    assert [frame.index for frame in frames] == list(range(20))
    np.testing.assert_allclose([frame.time for frame in frames], np.arange(20) / 12.5, atol=1e-3)
    for number, frame in enumerate(frames):  # in order, and red is red
        np.testing.assert_allclose(frame.image.reshape(-1, 3).mean(0), (20 + 10 * number, 0, 0), atol=6)
    assert reader.num_read == 20
    assert reader.broken is None
    assert no_readers()


def test_slow_reader_of_a_file_loses_nothing(tmp_path: Path):
    with FrameReader(drawn_video(tmp_path / "video.mp4", 15), read_ahead=2) as reader:
        indices = []
        for frame in reader:
            time.sleep(0.01)
            assert len(reader._queue) <= 2
            indices.append(frame.index)
    assert indices == list(range(15))


def test_leaving_in_the_middle_stops_the_thread(tmp_path: Path):
    with FrameReader(drawn_video(tmp_path / "video.mp4", 20), read_ahead=1) as reader:
        next(iter(reader))
    assert no_readers()
    assert reader.broken is None
    assert list(reader) == []  # closed is closed


def test_leaving_before_the_last_frames_is_no_broken_video(tmp_path: Path):
    with FrameReader(drawn_video(tmp_path / "video.mp4", 6)) as reader:
        next(iter(reader))
        while not reader._ended:  # all of it lies in the queue
            time.sleep(0.001)
    assert reader.broken is None


def test_folder_of_images_in_natural_order(tmp_path: Path):
    for number in (10, 2, 1):
        cv2.imwrite(str(tmp_path / f"{number}.png"), coloured(number, width=60 + number)[..., ::-1])
    (tmp_path / "notes.txt").write_text("no image")
    with FrameReader(tmp_path) as reader:
        frames = list(reader)
    assert [frame.name for frame in frames] == ["1.png", "2.png", "10.png"]
    assert [frame.time for frame in frames] == [0.0, 0.5, 1.0]
    assert frames[2].image[0, 0].tolist() == [120, 0, 0]
    assert reader.size == (48, 61)
    assert (reader.rate, reader.num_frames, reader.live) == (2.0, 3, False)


def test_rotten_image_of_a_folder_is_skipped_and_named(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "a.png"), coloured(1))
    (tmp_path / "b.jpg").write_bytes(b"no jpeg")
    cv2.imwrite(str(tmp_path / "c.png"), coloured(2))
    with FrameReader(tmp_path) as reader:
        frames = list(reader)
    assert [(frame.index, frame.name) for frame in frames] == [(0, "a.png"), (1, "c.png")]
    assert len(reader.skipped) == 1
    assert "b.jpg" in reader.skipped[0]
    assert reader.broken is None


def test_one_image_is_a_source(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "a.png"), coloured(1))
    with FrameReader(tmp_path / "a.png") as reader:
        assert [frame.name for frame in reader] == ["a.png"]


def test_camera_drops_old_frames_rather_than_lag(monkeypatch: pytest.MonkeyPatch):
    camera = Camera(count=40, pause=0.002)
    monkeypatch.setattr(video, "_capture", lambda source: camera)
    # A clock that goes by the camera's frames: that of a busy machine runs on while a thread waits for a core.
    monkeypatch.setattr(video, "time", SimpleNamespace(monotonic=lambda: 7 + 0.5 * (39 - camera.left)))
    with FrameReader("0") as reader:
        time.sleep(0.01)  # as long as a network takes to load, or longer
        assert reader.live
        assert reader.num_frames is None
        assert reader.rate == 30.0  # the camera says 0
        frames = []
        for frame in reader:
            time.sleep(0.02)
            frames.append(frame)
    assert reader.num_dropped > 0
    assert len(frames) + reader.num_dropped == 40
    assert frames[-1].index == 39  # the newest one is never lost
    assert np.all(np.diff([frame.index for frame in frames]) > 0)
    assert reader.broken == f"broke off after {len(frames)} frames: the stream ended"
    assert camera.released
    assert frames[0].time == 0  # the clock begins with the first frame given, however long nobody asked
    assert [frame.time for frame in frames] == [0.5 * (frame.index - frames[0].index) for frame in frames]


def test_video_cut_off_in_the_middle_ends_cleanly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    camera = Camera(count=7)
    monkeypatch.setattr(
        camera, "get", lambda what: {cv2.CAP_PROP_FPS: 10.0, cv2.CAP_PROP_FRAME_COUNT: 50.0}.get(what, 0.0)
    )
    monkeypatch.setattr(video, "_capture", lambda source: camera)
    with FrameReader("http://somewhere/video.mp4") as reader:
        frames = list(reader)
    assert not reader.live
    assert [frame.time for frame in frames] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert reader.broken == "ended after 7 of 50 frames: the file is cut off or damaged"


def test_error_of_opencv_in_the_middle_ends_cleanly(monkeypatch: pytest.MonkeyPatch):
    camera = Camera(count=3)
    read = camera.read

    def fail_at_the_end() -> tuple[bool, np.ndarray | None]:
        if camera.left == 0:
            raise cv2.error("lost the\n  decoder")
        return read()

    monkeypatch.setattr(camera, "read", fail_at_the_end)
    monkeypatch.setattr(video, "_capture", lambda source: camera)
    with FrameReader("0") as reader:
        list(reader)
    assert reader.broken is not None
    assert reader.broken.endswith("lost the decoder")
    assert camera.released


def test_error_in_the_thread_reaches_the_reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def frames(self: FrameReader) -> Generator[Frame, None, None]:
        self.rate = 1.0

        def give() -> Generator[Frame, None, None]:
            yield Frame(coloured(0), 0, 0.0)
            raise RuntimeError("a mistake of ours")

        return give()

    monkeypatch.setattr(FrameReader, "_open_images", frames)
    with FrameReader("x") as reader, pytest.raises(RuntimeError, match="a mistake of ours"):
        list(reader)


@needs_shared("data/video")
def test_truncated_real_video_ends_cleanly(tmp_path: Path):
    whole = (SHARED / "data" / "video" / "one-by-one-person-detection.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:250_000])
    with FrameReader(tmp_path / "cut.mp4") as reader:
        count = sum(1 for _ in reader)
    assert reader.size == (432, 768)
    assert 50 < count < 200
    assert reader.broken == f"ended after {count} of 1394 frames: the file is cut off or damaged"


def test_source_that_does_not_open_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(FileNotFoundError, match=r"video\.mp4: no such file or folder; a source is a video, an image"):
        FrameReader(tmp_path / "video.mp4")
    (tmp_path / "video.mp4").write_text("this is a text")
    with pytest.raises(OSError, match=r"video\.mp4: not a video that OpenCV can read"):
        FrameReader(tmp_path / "video.mp4")
    with pytest.raises(OSError, match="camera 97 does not open: not there, in use, or not permitted"):
        FrameReader("97")
    with pytest.raises(OSError, match=r"rtsp://127\.0\.0\.1:9/none: the stream does not open: wrong address"):
        FrameReader("rtsp://127.0.0.1:9/none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: no images in this folder \(\.bmp, "):
        FrameReader(tmp_path / "empty")
    (tmp_path / "empty" / "a.jpg").write_bytes(b"")
    with pytest.raises(OSError, match=r"empty: not one frame could be read \(the first: .*a\.jpg"):
        FrameReader(tmp_path / "empty")
    monkeypatch.setattr(video, "_capture", lambda source: Camera(count=0))
    with pytest.raises(OSError, match=r"0: not one frame could be read \(the stream ended\)"):
        FrameReader("0")
    assert no_readers()


def test_opencv_and_ffmpeg_keep_quiet_about_a_source_that_does_not_open(tmp_path: Path):
    # A process of its own: FFmpeg reads how much it may say once, when a process first opens a video.
    (tmp_path / "video.mp4").write_text("this is a text")
    code = """
import sys
from detection.inference.video import FrameReader
for source in sys.argv[1:]:
    try:
        FrameReader(source)
    except OSError as error:
        print(error)
"""
    sources = [str(tmp_path / "video.mp4"), "97", "rtsp://127.0.0.1:9/none"]
    done = subprocess.run([sys.executable, "-c", code, *sources], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 3
    assert "not a video that OpenCV can read" in done.stdout
    assert done.stderr == ""  # the message says it


def test_writer_fits_frames_of_another_size(tmp_path: Path):
    with VideoWriter(tmp_path / "video.mp4", (48, 64), 10) as writer:
        writer.write(np.full((48, 64, 3), 200, np.uint8))
        writer.write(np.full((96, 64, 3), 200, np.uint8))  # becomes 48 x 32, in the middle
    with FrameReader(tmp_path / "video.mp4") as reader:
        first, second = (frame.image for frame in reader)
    assert (first > 180).all()
    assert (second[:, 20:44] > 180).all()
    assert (second[:, :12] < 40).all()
    assert (second[:, -12:] < 40).all()


def test_writer_keeps_the_clock_of_a_live_source(tmp_path: Path):
    with VideoWriter(tmp_path / "video.mp4", (48, 64), 10) as writer:
        writer.write(coloured(0), time=0.0)
        assert writer.num_frames == 1
        writer.write(coloured(1), time=0.32)  # three frames later
        assert writer.num_frames == 4
        writer.write(coloured(2), time=0.33)  # ahead: left out
        assert writer.num_frames == 4
    with FrameReader(tmp_path / "video.mp4") as reader:
        assert reader.num_frames == 4


def test_odd_sides_lose_one_pixel(tmp_path: Path):
    write_video(tmp_path / "video.mp4", [np.full((49, 65, 3), 99, np.uint8)] * 3, 10)
    with FrameReader(tmp_path / "video.mp4") as reader:
        assert (reader.size, reader.num_frames) == ((48, 64), 3)


def test_failing_writer_names_the_path(tmp_path: Path):
    with pytest.raises(ValueError, match=r"video\.gif: a video is written as one of \.avi, \.m4v, \.mkv, \.mov, \.mp4"):
        VideoWriter(tmp_path / "video.gif", (48, 64), 10)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(OSError, match=r"folder\.mp4: the video cannot be written \(64 x 48, 10 frames/s\)"):
        VideoWriter(tmp_path / "folder.mp4", (48, 64), 10)
    with pytest.raises(ValueError, match="a video needs at least one image"):
        write_video(tmp_path / "video.mp4", [], 10)


def test_lost_frames_are_found_at_the_end(tmp_path: Path):
    writer = VideoWriter(tmp_path / "video.mp4", (48, 64), 10)
    for number in range(5):
        writer.write(coloured(number))
    writer.num_frames = 9
    with pytest.raises(OSError, match=r"video\.mp4: 5 of 9 frames are in the file; is the disk full\?"):
        writer.close()


def test_video_is_finished_when_an_error_passes(tmp_path: Path):
    with pytest.raises(RuntimeError, match="elsewhere"), VideoWriter(tmp_path / "video.mp4", (48, 64), 10) as writer:  # noqa: PT012
        writer.write(coloured(0))
        writer.write(coloured(1))
        raise RuntimeError("elsewhere")
    with FrameReader(tmp_path / "video.mp4") as reader:
        assert len(list(reader)) == 2


def test_video_is_h264_that_browsers_play(tmp_path: Path):
    path = tmp_path / "video.mp4"
    with VideoWriter(path, (49, 65), 29.97) as writer:
        assert writer.codec == "H.264"
        for number in range(6):
            writer.write(coloured(number, 49, 65))
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.height, stream.width, stream.average_rate) == (48, 64, Fraction(30000, 1001))
        assert sum(1 for _ in container.decode(video=0)) == 6
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # the index first: it plays while it loads


@pytest.mark.parametrize(
    ("rate", "exact"),
    [
        (25, (25, 1)),
        (12.5, (25, 2)),
        (29.97, (30000, 1001)),
        (23.976, (24000, 1001)),
        (59.94006, (60000, 1001)),
        (2, (2, 1)),
    ],
)
def test_rates_are_the_fractions_that_are_meant(rate: float, exact: tuple[int, int]):
    assert exact_rate(rate) == Fraction(*exact)


def test_without_h264_it_is_mpeg4_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    monkeypatch.setattr(video, "h264_encoder", lambda: None)
    with VideoWriter(tmp_path / "video.mp4", (48, 64), 10) as writer:
        writer.write(coloured(3))
    assert writer.codec == "MPEG-4 part 2"
    assert "no H.264 encoder here" in caplog.text
    with FrameReader(tmp_path / "video.mp4") as reader:
        assert reader.num_frames == 1


def test_a_pattern_of_images_is_a_source(tmp_path: Path):
    for name in ("a10.png", "a2.png", "b1.png", "a3.txt"):
        cv2.imwrite(str(tmp_path / name), coloured(0)) if name.endswith("png") else (tmp_path / name).write_text("")
    with FrameReader(tmp_path / "a*") as reader:
        assert [frame.name for frame in reader] == ["a2.png", "a10.png"]
    with pytest.raises(FileNotFoundError, match="no image fits this pattern"):
        FrameReader(tmp_path / "z*.jpg")
