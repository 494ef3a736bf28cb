"""Watch a detector on a video, a camera, a stream or a folder of images.

$ litedet video RUN/best.pt --source FILE|0|URL|FOLDER --out OUT.mp4 --json OUT.jsonl

It ends with the video, or with q or Esc in the window. Ctrl-C, SIGTERM (docker stop), SIGHUP (a closed terminal) and a source
that breaks off end it too, with an exit status other than 0. Video and lines are whole in all these cases.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.cli.stopping import Terminated, let_go_of_terminal, terminated_as_interrupted
from detection.engine.errors import main_errors

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.inference.video import Frame, FrameReader
    from detection.structures import Detections

_WINDOW = "LiteDet (q ends)"


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2), or a published
    name (ssdlite_mobilenet_v2_coco)."""
    source: str
    """A video, an image, a folder of images, the number of a camera (0 is the first), or the URL of a stream."""
    out: Path | None = None
    """Video to write: the source with boxes, classes, scores and the frame rate drawn on it, at the source's rate and size."""
    json: Path | None = None
    """Detections to write, one line of JSON for each frame."""
    score: float | None = None
    """Detections below this score are left out. None: below the best threshold of their class where the checkpoint has
    them (litedet eval --write-thresholds), else below 0.4."""
    show: bool = False
    """Show the video in a window while it is made."""
    device: str = "auto"
    """Where the network runs: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    max_frames: int | None = None
    """End after this many frames."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""
        if self.out is None and self.json is None and not self.show:
            raise UserError("nothing would come of it: give --out VIDEO.mp4, --json FILE.jsonl or --show")
        if self.score is not None and not 0 <= self.score <= 1:
            raise UserError(f"--score {self.score}: a score lies between 0 and 1")
        if self.max_frames is not None and self.max_frames < 1:
            raise UserError(f"--max-frames {self.max_frames}: must be at least 1")


@dataclass(kw_only=True, slots=True)
class DemoResult:
    """What was done.

    Attributes:
        num_frames: frames that went through the network.
        seconds: wall time from the first of them to the end.
        network_seconds: of these, in the predictor (placing, network, post-processing).
        broken: why the source ended before its time; None where it did not.
        skipped: "path: reason" of images of a folder that could not be read.
    """

    num_frames: int
    seconds: float
    network_seconds: float
    broken: str | None
    skipped: list[str]


@main_errors
def main(argv: Sequence[str] | None = None) -> DemoResult:
    config = tyro.cli(DemoConfig, args=argv, description=__doc__)
    config.validate()
    refuse_overwrites(
        {"the checkpoint": config.checkpoint, "--source": config.source}, {"--out": config.out, "--json": config.json}
    )
    terminated: Terminated | None = None
    try:
        with terminated_as_interrupted():
            result, terminated = _watch(config)
    except Terminated as error:  # before the first frame
        terminated = error
        with contextlib.suppress(OSError):
            print(error, file=sys.stderr)
    if terminated is not None:
        let_go_of_terminal()
        raise SystemExit(terminated.status)
    if result.broken:
        raise SystemExit(f"error: {config.source} {result.broken}; what was made until then is kept")
    return result


def _watch(config: DemoConfig) -> tuple[DemoResult, Terminated | None]:
    """Goes through the source; the signal that ended it, if one did."""
    import supervision as sv

    from detection.images.draw import draw_detections, draw_frame_rate
    from detection.inference.predictor import load_detector
    from detection.inference.video import FrameReader, VideoWriter

    terminated: Terminated | None = None
    with ExitStack() as stack:
        # The quick checks come first: the network takes seconds to load.
        reader = stack.enter_context(FrameReader(config.source))
        if config.show:
            stack.callback(_open_window())
        detector = load_detector(
            config.checkpoint, device=config.device, score_threshold=config.score, default_score=0.4
        )
        video = stack.enter_context(VideoWriter(config.out, reader.size, reader.rate)) if config.out else None
        lines = None
        if config.json:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            lines = stack.enter_context(config.json.open("w", encoding="utf-8"))

        num_frames = 0
        network_seconds = 0.0
        frame_rate = sv.FPSMonitor(sample_size=30)
        total = min((n for n in (reader.num_frames, config.max_frames) if n is not None), default=None)
        progress = stack.enter_context(
            tqdm(total=total, unit="frame", dynamic_ncols=True, desc=Path(config.source).name)
        )
        begin = time.monotonic()
        try:
            for frame in reader:
                before = time.monotonic()
                found = detector(frame.image)
                network_seconds += time.monotonic() - before
                frame_rate.tick()
                if lines:
                    lines.write(json.dumps(_record(frame, found)) + "\n")
                    lines.flush()  # whoever kills this process keeps the lines so far
                stop = False
                if video or config.show:
                    drawn = draw_frame_rate(draw_detections(frame.image, found), frame_rate.fps)
                    if video:
                        video.write(drawn, time=frame.time if reader.live else None)
                    stop = config.show and _show(drawn)
                num_frames += 1
                progress.update()
                if stop or num_frames == config.max_frames:
                    break
        except KeyboardInterrupt as error:
            terminated = error if isinstance(error, Terminated) else Terminated(signal.SIGINT)
            with contextlib.suppress(OSError):  # the terminal may be what was closed
                progress.write(str(terminated), file=sys.stderr)
        seconds = time.monotonic() - begin
    result = DemoResult(
        num_frames=num_frames,
        seconds=seconds,
        network_seconds=network_seconds,
        broken=reader.broken,
        skipped=reader.skipped,
    )
    try:
        _print_summary(result, config, reader)
    except OSError:
        if terminated is None:
            raise
    return result, terminated


def _record(frame: Frame, found: Detections) -> dict[str, object]:
    """A line of --json. Boxes are xyxy in pixels of the frame; a folder's frames also carry the name of their file."""
    detections = [
        {"box": [round(x, 2) for x in box], "score": round(score, 4), "label": label, "class": name}
        for box, score, label, name in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names(), strict=True
        )
    ]
    named = {} if frame.name is None else {"file": frame.name}
    return {"frame": frame.index, "time": round(frame.time, 4), **named, "detections": detections}


def _print_summary(result: DemoResult, config: DemoConfig, reader: FrameReader) -> None:
    rate = result.num_frames / result.seconds if result.seconds else 0.0
    print(
        f"{result.num_frames} frames in {result.seconds:.1f} s ({rate:.1f} frames/s), "
        f"of which the network {result.network_seconds:.1f} s"
        + (f"; {reader.num_dropped} frames of the live source were left out to keep up" if reader.num_dropped else "")
    )
    for what in result.skipped:
        print(f"left out: {what}")
    for what, path in (("video", config.out), ("detections", config.json)):
        if path:
            print(f"{what}: {path}")


def _open_window() -> Callable[[], None]:
    """Opens the window and returns what closes it.

    Raises:
        UserError: there is no screen, or this OpenCV was built without windows.
    """
    # Asked beforehand: without a screen Qt ends the process, and no exception can be caught.
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        raise UserError("--show needs a screen, and there is none here (DISPLAY is not set); write a video with --out")
    try:
        cv2.namedWindow(_WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise UserError(
            "--show needs an OpenCV with windows, and this one has none; "
            "pip uninstall opencv-python-headless, then pip install --force-reinstall opencv-python"
        ) from error
    return cv2.destroyAllWindows


def _show(image: NDArray[np.uint8]) -> bool:
    """Shows an RGB image; whether the user wants to end (q, Esc, or the window closed)."""
    cv2.imshow(_WINDOW, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    key = cv2.waitKey(1) & 0xFF
    return key in (ord("q"), 27) or cv2.getWindowProperty(_WINDOW, cv2.WND_PROP_VISIBLE) < 1
