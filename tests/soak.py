#!/usr/bin/env python3
"""Trains, and runs a video, for as long as you like on drawn data, and fails where memory, files or threads grow.

$ python tests/soak.py --minutes 60 --out FOLDER
$ python tests/soak.py --minutes 60 --out FOLDER --part video    # one of the two: both at a time take an hour, not two

Leaves soak.png and soak.json in FOLDER: memory, open files and threads over time. Linux. Status 1 where something grows.
"""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_START_SECONDS = 180  # until the first epoch or video is done
_SHARE_ALLOWED = 0.03  # of the memory after the warm-up ...
_MIB_ALLOWED = 24.0  # ... and this much besides: one image of a validation set may be larger than all before it
_LEAST_SAMPLES = 40  # also where the machine is busy
_LEAST_ROUNDS = 5  # epochs or videos: each quarter then sees whole ones
_FILES_ALLOWED = 3  # one may be open at the moment of one sample and not of another

_VIDEOS = """
import sys
from detection.cli.video import main
while True:
    main(sys.argv[2:])
    with open(sys.argv[1], "a") as done:
        done.write("one more\\n")
"""


@dataclass(slots=True)
class Sample:
    """What a process and those that it started hold at one moment.

    Attributes:
        seconds: since the first sample.
        mib: resident memory of the process itself.
        workers_mib: of those that it started, all together; pages that they share count for each.
        files: open ones.
        threads: of all of them.
    """

    seconds: float
    mib: float
    workers_mib: float
    files: int
    threads: int


def sample(pid: int, seconds: float) -> Sample:
    """See ``Sample``.

    Raises:
        FileNotFoundError, ProcessLookupError: the process is gone.
    """
    own = _status(pid)
    others = [_status(child) for child in _children(pid)]
    return Sample(
        seconds=seconds,
        mib=own[0],
        workers_mib=sum(one[0] for one in others),
        files=own[1] + sum(one[1] for one in others),
        threads=own[2] + sum(one[2] for one in others),
    )


def _status(pid: int) -> tuple[float, int, int]:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    num_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(lines["VmRSS"].split()[0]) / 1024, num_files, int(lines["Threads"])


def _children(pid: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:  # ended meanwhile
            continue
        if parent == pid:
            found.append(int(folder.name))
    return found


def watch(command: Sequence[str], log: Path, rounds: Callable[[], int], minutes: float) -> list[Sample]:
    """Samples a process once its first round is done, about 200 times and 40 at least, and ends it by SIGTERM.

    Args:
        rounds: how many epochs or videos are done; it is watched for 5 after the first, however long they take.

    Raises:
        RuntimeError: it ended by itself, or its first round was not done in time.
    """
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        end = time.monotonic() + _START_SECONDS
        while (first := rounds()) < 1:
            _require_alive(process, log)
            if time.monotonic() > end:
                raise RuntimeError(f"no round was done in {_START_SECONDS} s; {log} ends:\n{_end_of(log)}")
            time.sleep(0.1)
        samples: list[Sample] = []
        begin = time.monotonic()
        while (
            (seconds := time.monotonic() - begin) < 60 * minutes
            or len(samples) < _LEAST_SAMPLES
            or rounds() < first + _LEAST_ROUNDS
        ):
            _require_alive(process, log)
            samples.append(sample(process.pid, seconds))
            time.sleep(min(max(0.1, 60 * minutes / 200), 10))
        return samples
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _require_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    if process.poll() is not None:
        raise RuntimeError(f"ended by itself with status {process.returncode}; {log} ends:\n{_end_of(log)}")


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def growth(samples: Sequence[Sample]) -> list[str]:
    """What grew, in words, from the second quarter to the last; the first is the warm-up.

    Of memory their medians are compared, of files and threads their least: how many are open for batches on their way from
    data workers goes up and down with each epoch, and what leaks lifts the least of them too.
    """
    quarter = len(samples) // 4
    if not quarter:
        return [f"{len(samples)} samples are too few to tell"]
    before, after = samples[quarter : 2 * quarter], samples[-quarter:]
    found = []
    for name, unit in (("mib", "MiB of memory"), ("workers_mib", "MiB of memory of the workers"),
                       ("files", "open files"), ("threads", "threads")):  # fmt: skip
        level = statistics.median if "mib" in name else min
        was, now = (level([getattr(one, name) for one in part]) for part in (before, after))
        allowed = _SHARE_ALLOWED * was + _MIB_ALLOWED if "mib" in name else _FILES_ALLOWED
        if now > was + allowed:
            found.append(f"{unit}: {was:.0f} -> {now:.0f}")
    return found


def train_command(folder: Path) -> tuple[list[str], Callable[[], int]]:
    """A training with two data workers that evaluates, writes checkpoints and TensorBoard again and again."""
    from detection.data.drawn import draw_detection_set

    drawn = draw_detection_set(folder / "drawn", 36, 8, (160, 160), 0)
    command = [
        *(sys.executable, "-m", "detection.cli.train", f"{ROOT}/configs/finetune.py:detector"),
        *("--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)),
        *("--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)),
        *("--run-dir", f"{folder}/run", "--data.workers", "2", "--train.device", "cpu", "--train.num-threads", "1"),
        *("--model.input-size", "160", "160", "--model.backbone.width", "0.35", "--model.backbone.frozen-stages", "0"),
        *("--train.epochs", "1000000", "--train.checkpoint-every-steps", "3"),
    ]
    return command, lambda: _num_lines(folder / "run" / "metrics.jsonl")


def _num_lines(path: Path) -> int:
    return path.read_text().count("\n") if path.exists() else 0


def video_command(folder: Path) -> tuple[list[str], Callable[[], int]]:
    """A video that is read, run through a detector and written, again and again in one process."""
    import numpy as np
    import torch

    from detection.data.drawn import draw_video_frames
    from detection.inference.video import write_video
    from detection.models.build import build_detector
    from detection.models.litedet import LiteDetConfig
    from detection.postprocess import PostprocessConfig
    from detection.weights.info import DetectorInfo
    from detection.weights.native import save_detector

    torch.manual_seed(0)
    config = LiteDetConfig(input_size=(160, 160))
    config.backbone.width = 0.35
    info = DetectorInfo(model=config, postprocess=PostprocessConfig(), class_names=("a", "b"), category_ids=(1, 2))
    save_detector(folder / "d.safetensors", build_detector(config, 2), info)
    frames = (np.ascontiguousarray(one.image) for one in draw_video_frames(60, (240, 320), 0))
    write_video(folder / "in.mp4", frames, 30.0)
    command = [
        *(sys.executable, "-c", _VIDEOS, f"{folder}/done", f"{folder}/d.safetensors", "--source", f"{folder}/in.mp4"),
        *("--out", f"{folder}/out.mp4", "--json", f"{folder}/out.jsonl", "--device", "cpu", "--score", "0.01"),
    ]
    return command, lambda: _num_lines(folder / "done")


def draw_curves(path: Path, parts: dict[str, list[Sample]]) -> None:
    """Memory above, files and threads below, a column for each part."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(parts), 6), layout="constrained")
    axes = figure.subplots(2, len(parts), squeeze=False)
    for column, (name, samples) in enumerate(parts.items()):
        minutes = [one.seconds / 60 for one in samples]
        above, below = axes[0][column], axes[1][column]
        above.plot(minutes, [one.mib for one in samples], label="process")
        above.plot(minutes, [one.workers_mib for one in samples], label="its data workers")
        below.plot(minutes, [one.files for one in samples], label="open files")
        below.plot(minutes, [one.threads for one in samples], label="threads")
        above.set(title=name, ylabel="resident memory, MiB", ylim=(0, None))
        below.set(xlabel="minutes", ylabel="number", ylim=(0, None))
        for one in (above, below):
            one.legend()
            one.grid(alpha=0.3)
    figure.savefig(path, dpi=80)


PARTS = {"training": train_command, "video": video_command}


def soak(out: Path, minutes: float, names: Sequence[str] = tuple(PARTS)) -> list[str]:
    """Runs these parts, one after another, and writes soak.png and soak.json into ``out``; gives what grew."""
    out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[Sample]] = {}
    found = []
    for name in names:
        make = PARTS[name]
        with tempfile.TemporaryDirectory(prefix="litedet-soak-") as folder:
            command, rounds = make(Path(folder))
            parts[name] = watch(command, out / f"{name}.log", rounds, minutes)
        found += [f"{name}: {text}" for text in growth(parts[name])]
        first, last = parts[name][len(parts[name]) // 4], parts[name][-1]
        print(
            f"{name}: {minutes:g} minutes, {first.mib:.0f} MiB after a quarter and {last.mib:.0f} MiB at the end, "
            f"{first.files} and {last.files} open files, {first.threads} and {last.threads} threads"
        )
    plain = {name: [asdict(one) for one in samples] for name, samples in parts.items()}
    (out / "soak.json").write_text(json.dumps({"minutes": minutes, "grew": found, **plain}) + "\n")
    draw_curves(out / "soak.png", parts)
    return found


def main() -> int:
    """The command; gives the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="of each part (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder of soak.png, soak.json and the logs")
    parser.add_argument("--part", choices=tuple(PARTS), help="this part alone (default: one after the other)")
    arguments = parser.parse_args()
    found = soak(arguments.out, arguments.minutes, [arguments.part] if arguments.part else list(PARTS))
    for text in found:
        print(f"error: grew: {text}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
