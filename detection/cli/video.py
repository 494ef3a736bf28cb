"""Watch a detector on a video, a camera, a stream or a folder of images.

$ litedet video RUN/best.pt --source FILE|0|URL|FOLDER|"*.jpg" --out OUT.mp4 --json OUT.jsonl

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

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.cli.stopping import Terminated, let_go_of_terminal, terminated_as_interrupted
from detection.engine.errors import main_errors
from detection.engine.progress import progress_bar

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.inference.video import Frame, FrameReader
    from detection.structures import Detections

_WINDOW = "LiteDet (q ends)"
_SCORE = 0.4  # without --score, where the checkpoint has no thresholds of its own


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2, .pte,
    .param), or a published name (ssdlite_mobilenet_v2_coco)."""
    source: str
    """A video, an image, a folder of images, a pattern ("shots/*.jpg"), the number of a camera (0 is the first), or the URL
    of a stream."""
    out: Path | None = None
    """Video to write: the source with boxes, classes, scores and the frame rate drawn on it, at the source's rate and size
    (H.264; docs/video.md). A name without a suffix is a folder: an image for each frame, without the frame rate."""
    json: Path | None = None
    """Detections to write, one line of JSON for each frame."""
    score: float | None = None
    """Detections below this score are left out. None: below the best threshold of their class where the checkpoint has
    them (litedet eval --write-thresholds), else below 0.4. With --track one score holds for all classes, None is 0.4, and
    weaker detections stay where they continue a track."""
    track: bool = False
    """Follow objects: an id on each box and in each line, and a trace of where it came from (needs
    pip install 'litedet[track]')."""
    count: tuple[float, float, float, float] | None = None
    """Count what crosses the line X1 Y1 X2 Y2 (pixels of the frame), by class; switches --track on. In is from right to left
    of somebody who goes from (X1, Y1) to (X2, Y2)."""
    slice: int | None = None
    """For small objects: look at slices of so many pixels too, which overlap by a fifth. Takes time for each slice."""
    against: Path | None = None
    """A second checkpoint: both side by side, each half with its name."""
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
        if self.slice is not None and self.slice < 32:
            raise UserError(f"--slice {self.slice}: a slice has at least 32 pixels")
        if self.count is not None and self.count[:2] == self.count[2:]:
            raise UserError("--count: a line has two different ends, X1 Y1 X2 Y2")
        if self.against is not None and (self.track or self.count):
            raise UserError("--against shows two detectors side by side; --track and --count follow one, so not both")
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
    to_folder = config.out is not None and not config.out.suffix
    inputs = {"the checkpoint": config.checkpoint, "--against": config.against, "--source": config.source}
    refuse_overwrites(inputs, {"--out": None if to_folder else config.out, "--json": config.json})
    if to_folder:
        _refuse_folder(config)
    if config.count and not config.track:
        print("--count needs ids: --track is on")
        config.track = True
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

    from detection.images.draw import Traces, draw_detections, draw_frame_rate, draw_line, side_by_side
    from detection.inference.predictor import load_detector
    from detection.inference.slices import SlicedPredictor
    from detection.inference.track import WEAKEST, LineCounter, Tracked, Tracker
    from detection.inference.video import FrameReader, ImageWriter, VideoWriter

    def load(path: Path) -> Callable[[NDArray[np.uint8]], Detections]:
        score = min(WEAKEST, _score_of_tracks(config)) if config.track else config.score
        detector = load_detector(path, device=config.device, score_threshold=score, default_score=_SCORE)
        return detector if config.slice is None else SlicedPredictor(detector, config.slice)

    terminated: Terminated | None = None
    with ExitStack() as stack:
        # The quick checks come first: the network takes seconds to load.
        reader = stack.enter_context(FrameReader(config.source))
        if config.show:
            stack.callback(_open_window())
        tracker = Tracker(reader.rate, _score_of_tracks(config)) if config.track else None
        counter = LineCounter(config.count) if config.count else None
        traces = Traces(reader.rate, reader.size) if config.track else None
        detector = load(config.checkpoint)
        other = load(config.against) if config.against else None
        height, width = reader.size
        size = (height, width * 2) if other else (height, width)
        video, images = None, None
        if config.out and config.out.suffix:
            video = stack.enter_context(VideoWriter(config.out, size, reader.rate))
        elif config.out:
            images = ImageWriter(config.out)
        lines = None
        if config.json:
            config.json.parent.mkdir(parents=True, exist_ok=True)
            lines = stack.enter_context(config.json.open("w", encoding="utf-8"))

        num_frames = 0
        network_seconds = 0.0
        frame_rate = sv.FPSMonitor(sample_size=30)
        total = min((n for n in (reader.num_frames, config.max_frames) if n is not None), default=None)
        progress = stack.enter_context(progress_bar(total=total, unit="frame", desc=Path(config.source).name))
        begin = time.monotonic()
        try:
            for frame in reader:
                before = time.monotonic()
                found = detector(frame.image)
                found_by_other = other(frame.image) if other else None
                network_seconds += time.monotonic() - before
                frame_rate.tick()
                tracked = tracker(found) if tracker else Tracked(found, [])
                found = tracked.detections
                if counter:
                    counter(tracked)
                if lines:
                    record = _record(frame, found, tracked.ids if tracker else None)
                    if counter:
                        record["counts"] = counter.counts
                    if found_by_other is not None:
                        record["against"] = _detections(found_by_other, None)
                    lines.write(json.dumps(record) + "\n")
                    lines.flush()  # whoever kills this process keeps the lines so far
                stop = False
                if video or images or config.show:
                    scene = traces(frame.image, found, tracked.ids) if traces else frame.image
                    drawn = draw_detections(scene, found, ids=tracked.ids)
                    if counter:
                        drawn = draw_line(drawn, counter.line, counter.counts)
                    if found_by_other is not None:
                        assert config.against is not None
                        names = _names_apart(config.checkpoint, config.against)
                        drawn = side_by_side(drawn, draw_detections(frame.image, found_by_other), names)
                    if images:
                        images.write(drawn, frame)
                    if video or config.show:
                        drawn = draw_frame_rate(drawn, frame_rate.fps)
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


def _score_of_tracks(config: DemoConfig) -> float:
    return _SCORE if config.score is None else config.score


def _record(frame: Frame, found: Detections, ids: Sequence[int | None] | None) -> dict[str, object]:
    """A line of --json. Boxes are xyxy in pixels of the frame; a folder's frames also carry the name of their file."""
    named = {} if frame.name is None else {"file": frame.name}
    return {"frame": frame.index, "time": round(frame.time, 4), **named, "detections": _detections(found, ids)}


def _detections(found: Detections, ids: Sequence[int | None] | None) -> list[dict[str, object]]:
    """Detections for a line of --json, with "track" where there are ids."""
    records: list[dict[str, object]] = [
        {"box": [round(x, 2) for x in box], "score": round(score, 4), "label": label, "class": name}
        for box, score, label, name in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.names(), strict=True
        )
    ]
    if ids is not None:
        for record, number in zip(records, ids, strict=True):
            record["track"] = number
    return records


def _names_apart(first: Path, second: Path) -> tuple[str, str]:
    """Names for the two halves: those of the files, with their folders where both are called best.pt."""
    if first.name != second.name:
        return first.name, second.name
    return "/".join(first.parts[-2:]), "/".join(second.parts[-2:])


def _refuse_folder(config: DemoConfig) -> None:
    """Raises UserError where images written to the folder --out would be, or overwrite, those of the source."""
    assert config.out is not None
    source = Path(config.source)
    folder = source if source.is_dir() else source.parent
    if os.path.realpath(config.out) == os.path.realpath(folder):
        raise UserError(f"--out {config.out} is the folder of --source; its images would be overwritten")
    if config.out.is_file():
        raise UserError(
            f"--out {config.out} is a file; a video is called OUT.mp4, a folder must not be there as a file"
        )


def _print_summary(result: DemoResult, config: DemoConfig, reader: FrameReader) -> None:
    rate = result.num_frames / result.seconds if result.seconds else 0.0
    print(
        f"{result.num_frames} frames in {result.seconds:.1f} s ({rate:.1f} frames/s), "
        f"of which the network {result.network_seconds:.1f} s"
        + (f"; {reader.num_dropped} frames of the live source were left out to keep up" if reader.num_dropped else "")
    )
    for what in result.skipped:
        print(f"left out: {what}")
    for what, path in (
        ("video" if config.out and config.out.suffix else "images", config.out),
        ("detections", config.json),
    ):
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


if __name__ == "__main__":
    main()
