import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from test_predictor import small_detector

from detection.cli import video as demo_video
from detection.data.drawn import draw_video_frames
from detection.inference.video import FrameReader, write_video
from detection.structures import Detections
from detection.weights.native import save_detector


class FakeDetector:
    """Finds a box that moves one pixel to the right in each call."""

    class_names = ("cat", "dog")

    def __init__(self) -> None:
        self.calls = 0
        self.on_call: Callable[[int], None] = lambda call: None

    def __call__(self, image: np.ndarray) -> Detections:
        assert image.dtype == np.uint8
        assert image[..., 0].mean() > image[..., 2].mean()  # RGB: the test video is reddish
        self.on_call(self.calls)
        x = float(self.calls)
        self.calls += 1
        return Detections(
            boxes=torch.tensor([[x, 10, x + 20, 40]]),
            scores=torch.tensor([0.75]),
            labels=torch.tensor([1]),
            class_names=self.class_names,
        )


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> FakeDetector:
    fake = FakeDetector()
    monkeypatch.setattr("detection.inference.predictor.load_detector", lambda *_, **__: fake)
    return fake


@pytest.fixture
def video(tmp_path: Path) -> Path:
    reddish = np.full((96, 128, 3), (150, 90, 60), np.uint8)
    write_video(tmp_path / "video.mp4", [reddish] * 12, 12.5)
    return tmp_path / "video.mp4"


def run(video: Path, *options: str, out: str = "out.mp4") -> tuple[demo_video.DemoResult, list[dict]]:
    lines = video.parent / "out.jsonl"
    argv = ["best.pt", "--source", str(video), "--out", str(video.parent / out), "--json", str(lines), *options]
    result = demo_video.main(argv)
    return result, [json.loads(line) for line in lines.read_text().splitlines()]


def count_frames(path: Path) -> int:
    with FrameReader(path) as reader:
        return sum(1 for _ in reader)


def test_video_and_lines(video: Path, detector: FakeDetector, capsys: pytest.CaptureFixture[str]):
    result, lines = run(video)
    assert result.num_frames == 12
    assert result.broken is None
    assert 0 <= result.network_seconds <= result.seconds
    assert [line["frame"] for line in lines] == list(range(12))
    assert [line["time"] for line in lines] == pytest.approx(np.arange(12) / 12.5)
    assert lines[3] == {
        "frame": 3,
        "time": 0.24,
        "detections": [{"box": [3.0, 10.0, 23.0, 40.0], "score": 0.75, "label": 1, "class": "dog"}],
    }
    with FrameReader(video.parent / "out.mp4") as reader:
        assert (reader.rate, reader.size, reader.num_frames) == (12.5, (96, 128), 12)
        frames = [frame.image for frame in reader]
    # the box is on the video: its lower side is supervision's red (255, 64, 64)
    assert frames[5][40, 15].astype(int)[1] < 85
    assert frames[5][60, 15].astype(int)[1] == pytest.approx(90, abs=12)
    # and the frame rate, light on dark, in the corner
    assert frames[5][:14, :40].min() < 60
    printed = capsys.readouterr().out
    assert "12 frames in" in printed
    assert "of which the network" in printed
    assert f"video: {video.parent / 'out.mp4'}" in printed
    assert f"detections: {video.parent / 'out.jsonl'}" in printed


def test_drawn_video_keeps_every_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nothing = Detections(boxes=torch.zeros(0, 4), scores=torch.zeros(0), labels=torch.zeros(0, dtype=torch.int64))
    monkeypatch.setattr("detection.inference.predictor.load_detector", lambda *_, **__: lambda image: nothing)
    write_video(tmp_path / "video.mp4", (frame.image for frame in draw_video_frames(9, (96, 96), seed=0)), 25)
    _, lines = run(tmp_path / "video.mp4")
    assert len(lines) == 9
    assert lines[0]["detections"] == []


def test_ends_after_max_frames(video: Path, detector: FakeDetector):
    result, lines = run(video, "--max-frames", "5")
    assert (result.num_frames, len(lines), count_frames(video.parent / "out.mp4")) == (5, 5, 5)
    assert result.broken is None


def test_ctrl_c_leaves_whole_files(video: Path, detector: FakeDetector, capsys: pytest.CaptureFixture[str]):
    def interrupt(call: int) -> None:
        if call == 4:
            raise KeyboardInterrupt

    detector.on_call = interrupt
    with pytest.raises(SystemExit) as ended:
        run(video)
    assert ended.value.code == 130
    lines = (video.parent / "out.jsonl").read_text().splitlines()
    assert (len(lines), count_frames(video.parent / "out.mp4")) == (4, 4)
    printed = capsys.readouterr()
    assert "stopped by Ctrl-C" in printed.err
    assert "4 frames in" in printed.out


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signals of Unix")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_leaves_whole_files(tmp_path: Path, name: str, status: int):
    save_detector(tmp_path / "d.safetensors", *small_detector())
    write_video(tmp_path / "video.mp4", [np.full((96, 128, 3), (150, 90, 60), np.uint8)] * 2000, 25)
    out, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    argv = [str(tmp_path / "d.safetensors"), "--source", str(tmp_path / "video.mp4"), "--out", str(out)]
    code = "import sys; from detection.cli.video import main; main(sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv, "--json", str(lines), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (lines.is_file() and lines.read_text().count("\n") >= 5):
        time.sleep(0.05)
    process.send_signal(getattr(signal, name))
    process.send_signal(signal.SIGTERM)  # a second one must not cut off the closing
    printed, errors = process.communicate()
    assert process.returncode in (status, 143 if name == "SIGHUP" else status), errors
    assert "stopped by SIG" in errors
    assert "Traceback" not in errors
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(records) >= 5
    assert len(records) - count_frames(out) in (0, 1)  # the frame under way may have its line and not its image
    assert f"video: {out}" in printed


def test_broken_stream_leaves_whole_files(
    video: Path, detector: FakeDetector, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    class Breaking:
        def __init__(self, source: str) -> None:
            self.capture, self.left = cv2.VideoCapture(source), 6
            self.get, self.release = self.capture.get, self.capture.release

        def read(self) -> tuple:
            self.left -= 1
            return self.capture.read() if self.left >= 0 else (False, None)

    monkeypatch.setattr("detection.inference.video._capture", Breaking)
    with pytest.raises(SystemExit) as ended:
        run(video)
    monkeypatch.undo()
    # A text as the code: Python prints it to stderr and ends with status 1.
    assert ended.value.code == (
        f"error: {video} ended after 6 of 12 frames: the file is cut off or damaged; what was made until then is kept"
    )
    lines = (video.parent / "out.jsonl").read_text().splitlines()
    assert (len(lines), count_frames(video.parent / "out.mp4")) == (6, 6)
    assert "6 frames in" in capsys.readouterr().out


def test_lines_are_there_while_it_runs(video: Path, detector: FakeDetector):
    lengths: list[int] = []
    detector.on_call = lambda call: lengths.append(len((video.parent / "out.jsonl").read_text().splitlines()))
    run(video)
    assert lengths == list(range(12))


def test_folder_of_images(tmp_path: Path, detector: FakeDetector, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, size in (("a.png", (96, 128)), ("b.png", (64, 64))):
        cv2.imwrite(str(folder / name), np.full((*size, 3), (60, 90, 150), np.uint8))
    (folder / "c.png").write_bytes(b"rotten")
    result, lines = run(folder)
    assert [(line["frame"], line["file"]) for line in lines] == [(0, "a.png"), (1, "b.png")]
    with FrameReader(tmp_path / "out.mp4") as reader:
        assert (reader.rate, reader.size, reader.num_frames) == (2.0, (96, 128), 2)
    assert len(result.skipped) == 1
    assert "left out: " in (printed := capsys.readouterr().out)
    assert "c.png" in printed


def test_slices_reach_the_detector_as_a_batch(video: Path, detector: FakeDetector, monkeypatch: pytest.MonkeyPatch):
    sizes: list[list[tuple[int, ...]]] = []

    def batch(images: list[np.ndarray]) -> list[Detections]:
        sizes.append([image.shape[:2] for image in images])
        return [detector(image) for image in images]

    monkeypatch.setattr("detection.inference.predictor.load_detector", lambda path, **settings: batch)
    _, lines = run(video, "--slice", "96", "--max-frames", "1")
    assert sizes == [[(96, 128), (96, 96), (96, 96)]]  # 96 x 128 pixels: the whole, and slices at x = 0 and 32
    # The box of the whole (x 0 to 20) and that of the first slice (1 to 21) are one; the second slice's (2 to 22) moves by 32.
    assert [found["box"] for found in lines[0]["detections"]] == [[0, 10, 20, 40], [34, 10, 54, 40]]


def test_two_detectors_side_by_side(video: Path, monkeypatch: pytest.MonkeyPatch):
    detectors = {"best.pt": FakeDetector(), "other.pt": FakeDetector()}
    detectors["other.pt"].calls = 50
    monkeypatch.setattr("detection.inference.predictor.load_detector", lambda path, **settings: detectors[path.name])
    _, lines = run(video, "--against", "other.pt")
    assert len(lines) == 12
    assert lines[2]["detections"][0]["box"] == [2, 10, 22, 40]
    assert lines[2]["against"][0]["box"] == [52, 10, 72, 40]
    with FrameReader(video.parent / "out.mp4") as reader:
        assert [frame.image.shape for frame in reader] == [(96, 256, 3)] * 12


def test_images_out_are_one_a_frame(video: Path, detector: FakeDetector):
    run(video, out="frames")
    written = sorted((video.parent / "frames").iterdir())
    assert len(written) == 12
    image = cv2.imread(str(written[0]))
    assert image.shape == (96, 128, 3)
    assert (abs(image[20:35, 0:3].astype(int) - (60, 90, 150)).max()) > 40  # the box's left edge


def test_window_ends_on_q(video: Path, detector: FakeDetector, monkeypatch: pytest.MonkeyPatch):
    shown, closed = [], []
    monkeypatch.setattr(demo_video, "_open_window", lambda: lambda: closed.append(True))
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.append(image))
    monkeypatch.setattr(cv2, "waitKey", lambda delay: ord("q") if len(shown) == 3 else -1)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda name, what: 1.0)
    result, lines = run(video, "--show")
    assert (result.num_frames, len(lines), count_frames(video.parent / "out.mp4")) == (3, 3, 3)
    assert closed == [True]
    assert shown[0][90, 120, 0] < shown[0][90, 120, 2]  # BGR for OpenCV's window


def test_passes_score_and_device_on(video: Path, monkeypatch: pytest.MonkeyPatch):
    given = {}

    def load(path: Path, *, device: str, score_threshold: float | None, default_score: float) -> FakeDetector:
        given.update(path=path, device=device, score=score_threshold, default=default_score)
        return FakeDetector()

    monkeypatch.setattr("detection.inference.predictor.load_detector", load)
    run(video)
    assert given == {"path": Path("best.pt"), "device": "auto", "score": None, "default": 0.4}
    run(video, "--score", "0.7", "--device", "cpu")
    assert given == {"path": Path("best.pt"), "device": "cpu", "score": 0.7, "default": 0.4}


def error_of(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        demo_video.main(argv)
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    return printed


def test_wrong_use_is_one_clear_line(video: Path, detector: FakeDetector, capsys: pytest.CaptureFixture[str]):
    assert "nothing would come of it" in error_of(["best.pt", "--source", str(video)], capsys)
    to = ["--json", str(video.parent / "a.jsonl")]
    assert "--score 1.5: a score lies" in error_of(["best.pt", "--source", str(video), *to, "--score", "1.5"], capsys)
    assert "--max-frames 0" in error_of(["best.pt", "--source", str(video), *to, "--max-frames", "0"], capsys)
    assert "is the file of --source" in error_of(["best.pt", "--source", str(video), "--out", str(video)], capsys)
    assert "no such file or folder" in error_of(["best.pt", "--source", str(video) + "x", *to], capsys)
    assert "camera 97 does not open" in error_of(["best.pt", "--source", "97", *to], capsys)
    video.write_text("a text")
    assert "video.mp4: not a video that OpenCV can read" in error_of(["best.pt", "--source", str(video), *to], capsys)
    assert not (video.parent / "a.jsonl").exists()


def test_missing_checkpoint_is_named(video: Path, capsys: pytest.CaptureFixture[str]):
    argv = [str(video.parent / "none.pt"), "--source", str(video), "--json", str(video.parent / "a.jsonl")]
    assert "none.pt" in error_of(argv, capsys)


def test_show_without_a_screen(video: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    assert "--show needs a screen" in error_of(["best.pt", "--source", str(video), "--show"], capsys)


def test_show_with_an_opencv_without_windows(video: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def no_window(*_: object) -> None:
        raise cv2.error("The function is not implemented")

    monkeypatch.setitem(os.environ, "DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", no_window)
    assert "needs an OpenCV with windows" in error_of(["best.pt", "--source", str(video), "--show"], capsys)
