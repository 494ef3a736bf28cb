"""Environments of their own, without torch: what of ours runs in them, and where they are.

``bash tools/run_tests.sh`` makes them (tools/environment.sh: prepare_apart). Tests that need one skip where it is not there.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import pytest

from detection import load_detector
from detection.inference.video import FrameReader

_CONVERTER = ("litert_torch", "ai_edge_litert", "ai_edge_quantizer")
_MISSING = [name for name in _CONVERTER if not importlib.util.find_spec(name)]
LITERT_MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(_MISSING),
        reason=f"needs {', '.join(_MISSING)} (litedet[litert]); bash tools/run_tests.sh runs it in .venv-litert",
    ),
    # Of the converter and what it brings; they are not ours to mend.
    pytest.mark.filterwarnings("ignore"),
]
"""Of test files that need LiteRT's converter."""


ROOT = Path(__file__).resolve().parents[1]


def python_of(name: str) -> Path:
    """The Python of the environment .venv-NAME; skips where it was not made."""
    folder = ROOT / f".venv-{name}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not (folder / "installed").is_file():
        pytest.skip(f"needs the environment {folder.name}, which bash tools/run_tests.sh makes")
    return python


def run_python(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the Python of an environment, away from the checkout and from what would show it to it."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [python_of(name), *arguments],
        capture_output=True,
        text=True,
        env=clean,
        cwd=ROOT.anchor,
        stdin=subprocess.DEVNULL,
    )


def run_apart(name: str, bundle: Path, exported: Path, image: Path) -> None:
    """A bundle in an environment with what its requirements.txt names, and no torch: the same boxes, and a video and a camera."""
    script = bundle / "detect.py"
    packages = (bundle / "requirements.txt").read_text().split()
    look = "import sys, importlib.metadata as m, importlib.util as u; [m.version(p) for p in sys.argv[1:]]"
    look += "; print(u.find_spec('torch'))"
    assert run_python(name, "-c", look, *packages).stdout == "None\n"

    # An image.
    drawn = bundle.parent / "drawn.png"
    done = run_python(name, script, image, "--threshold", "0.3", "--out", drawn)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["detections"]
    expected = load_detector(exported, score_threshold=0.3)(image)
    assert len(found) == len(expected) > 0
    for one, box, score, label in zip(
        found, expected.boxes.tolist(), expected.scores.tolist(), expected.names(), strict=True
    ):
        assert one["box"] == pytest.approx(box, abs=1)
        assert one["score"] == pytest.approx(score, abs=0.01)
        assert one["class"] == label
    before, after = cv2.imread(str(image)), cv2.imread(str(drawn))
    assert after.shape == before.shape
    assert (before != after).any()

    # A video.
    video = bundle.parent / "video.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter_fourcc(*"mp4v"), 10, (before.shape[1], before.shape[0]))
    for _ in range(4):
        writer.write(before)
    writer.release()
    done = run_python(name, script, video, "--threshold", "0.3", "--frames", "3", "--out", bundle.parent / "boxes.mp4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["frame"] for line in lines] == [0, 1, 2]
    assert all(line["detections"] for line in lines)
    assert done.stderr.splitlines()[-1].startswith("3 frames, ")
    # Not by cv2.VideoCapture: FFmpeg's logs have the level that the first one in a process gives them, and ours is silence.
    with FrameReader(bundle.parent / "boxes.mp4") as written:
        assert written.rate == 10
        assert len(list(written)) == 3

    # A camera: one that is not there, and a fake one that gives the image until it is pulled out.
    done = run_python(name, script, "77")
    assert done.returncode == 1
    assert "camera 77 cannot be opened" in done.stderr
    fake = f"""
import sys, cv2, runpy
class Camera:
    left = 2
    def __init__(self, source): assert source == 0
    def isOpened(self): return True
    def get(self, what): return 0.0
    def release(self): pass
    def read(self):
        self.left -= 1
        return self.left >= 0, cv2.imread({str(image)!r})
cv2.VideoCapture = Camera
sys.argv = ["detect.py", "0", "--threshold", "0.3"]
runpy.run_path({str(script)!r}, run_name="__main__")
"""
    done = run_python(name, "-c", fake)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["detections"] for line in lines] == [found, found]
