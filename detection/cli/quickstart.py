"""Draw a dataset, train a detector on it, measure it, and run it on a video.

$ litedet quickstart
$ bash tools/quickstart.sh    makes the environment first

Nothing is downloaded; it takes some minutes on two CPU cores. A second run starts anew: it removes the folder of the first.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.cli import eval as eval_det
from detection.cli import train as train_det
from detection.cli import train_cls
from detection.cli import video as demo_video
from detection.cli.recipes import load_config
from detection.engine.errors import main_errors

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.data.drawn import DetectionSet

_MARK = ".quickstart"  # a folder with this file in it was made here and may be removed


@dataclass(kw_only=True, slots=True)
class QuickstartConfig:
    run_dir: Path = Path("runs/quickstart")
    """Folder for everything that is made, from the current folder. What an earlier quickstart made there is removed."""
    num_train: int = 2000
    """Images to train the detector on."""
    num_val: int = 200
    """Images to evaluate it on."""
    num_crops: int = 800
    """Images of each class to train the classifier on; a fifth as many to evaluate it on."""
    image_side: Annotated[int, tyro.conf.arg(aliases=["--picture-side"])] = 128
    """Height and width of the images in pixels."""
    crop_side: int = 64
    """Height and width of the classifier's images in pixels."""
    num_frames: int = 150
    """Frames of the video, 25 of them a second."""
    seed: int = 0
    """Seed of the drawing. The trainings have the seeds of their recipes."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        from detection.data.drawn import CLASS_NAMES, draw_classification_set, draw_detection_set

        for name in ("num_train", "num_val", "num_crops", "num_frames"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for name, images, recipe in (
            ("num_train", self.num_train, "detector"),
            ("num_crops", self.num_crops * len(CLASS_NAMES), "classifier"),
        ):
            batch_size = load_config([f"quickstart:{recipe}"], "").train.batch_size
            if images < batch_size:
                raise UserError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: that makes {images} images to train the {recipe} on, "
                    f"fewer than its batch of {batch_size}"
                )
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: must be 0 or above")
        with tempfile.TemporaryDirectory() as folder:  # as the real ones, which are drawn when the earlier run is gone
            draw_detection_set(Path(folder, "detection"), 1, 1, (self.image_side,) * 2, self.seed)
            draw_classification_set(Path(folder, "crops"), 1, 1, (self.crop_side,) * 2, self.seed)


@dataclass(kw_only=True, slots=True)
class QuickstartResult:
    """What ``summary.json`` holds.

    Attributes:
        AP: COCO AP on the images it did not train on, 0..1.
        AP50: AP at IoU 0.5.
        seconds: wall time of each part and of all of it.
        paths: where everything is.
    """

    AP: float
    AP50: float
    seconds: dict[str, float]
    paths: dict[str, Path]


@main_errors
def main(argv: Sequence[str] | None = None) -> QuickstartResult:
    config = tyro.cli(QuickstartConfig, args=argv, description=__doc__)
    config.validate()

    from detection.data.drawn import draw_classification_set, draw_detection_set, draw_video_frames
    from detection.inference.video import write_video

    run_dir = _clean_folder(config.run_dir)
    seconds: dict[str, float] = {}

    with _part("drawing the images", "data", seconds):
        size = (config.image_side, config.image_side)
        drawn = draw_detection_set(run_dir / "data" / "detection", config.num_train, config.num_val, size, config.seed)
        crop_size = (config.crop_side, config.crop_side)
        crops = draw_classification_set(
            run_dir / "data" / "classification", config.num_crops, -(-config.num_crops // 5), crop_size, config.seed
        )

    with _part("pretraining a classifier", "classifier", seconds):
        train_cls.main(
            [
                "quickstart:classifier",
                *("--data.train", str(crops[0]), "--data.val", str(crops[1])),
                *("--run-dir", str(run_dir / "classifier")),
            ]
        )
        backbone = run_dir / "classifier" / "backbone.safetensors"

    with _part("training the detector from that backbone", "detector", seconds):
        training = train_det.main(
            [
                "quickstart:detector",
                *("--data.train.annotations", str(drawn.train_annotations)),
                *("--data.train.images", str(drawn.train_images)),
                *("--data.val.annotations", str(drawn.val_annotations)),
                *("--data.val.images", str(drawn.val_images)),
                *("--weights", str(backbone)),
                *("--run-dir", str(run_dir / "detector")),
            ]
        )
        checkpoint = training.best_path

    with _part("evaluating it on images it did not train on", "evaluation", seconds):
        figures = eval_det.main(
            [
                str(checkpoint),
                *("--annotations", str(drawn.val_annotations), "--images", str(drawn.val_images)),
                *("--json", str(run_dir / "evaluation.json")),
            ]
        ).figures

    with _part("drawing what it finds", "images", seconds):
        images = _draw_images(run_dir / "images", drawn, checkpoint)

    with _part("running it on a video", "video", seconds):
        video, found = run_dir / "video.mp4", run_dir / "video_detections.mp4"
        frames = draw_video_frames(config.num_frames, size, config.seed)
        write_video(video, (_twice(frame.image) for frame in frames), rate=25)
        demo_video.main(
            [
                str(checkpoint),
                *("--source", str(video), "--out", str(found)),
                *("--json", str(run_dir / "video_detections.jsonl")),
            ]
        )

    result = QuickstartResult(
        AP=figures["AP"],
        AP50=figures["AP50"],
        seconds=seconds | {"total": round(sum(seconds.values()), 1)},
        paths={
            "data": run_dir / "data",
            "backbone": backbone,
            "detector": checkpoint,
            "figures": run_dir / "evaluation.json",
            **images,
            "video": video,
            "video with boxes": found,
            "video's detections": run_dir / "video_detections.jsonl",
            "its training": run_dir / "detector" / "report.html",
            "TensorBoard logs": run_dir / "detector" / "tensorboard",
            "summary": run_dir / "summary.json",
        },
    )
    _write_summary(result)
    print(_table(result))
    return result


def _clean_folder(run_dir: Path) -> Path:
    """An empty ``run_dir``.

    Raises:
        UserError: there is something in it that an earlier quickstart did not make.
    """
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        if not (run_dir / _MARK).is_file():
            raise UserError(f"{run_dir} is there and no quickstart made it; move it away or choose another --run-dir")
        print(f"removing the earlier run in {run_dir}")
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / _MARK).touch()
    return run_dir


@contextmanager
def _part(title: str, name: str, seconds: dict[str, float]) -> Iterator[None]:
    print(f"\n=== {title}", flush=True)
    begin = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - begin, 1)


def _draw_images(out_dir: Path, drawn: DetectionSet, checkpoint: Path) -> dict[str, Path]:
    """Sheets of training images with their true boxes and of new images with what is found, and some of these alone."""
    from detection.data.coco import CocoIndex
    from detection.data.drawn import CLASS_NAMES
    from detection.images.decode import read_image
    from detection.images.draw import draw_detections, draw_target, image_grid
    from detection.inference.predictor import load_detector

    out_dir.mkdir()
    truth = CocoIndex.read(drawn.train_annotations)
    targets = []
    for number in range(min(12, len(truth.image_ids))):
        objects = slice(truth.offsets[number], truth.offsets[number + 1])
        image = read_image(drawn.train_images / truth.file_name(number))
        targets.append(draw_target(image, truth.boxes[objects], truth.labels[objects], CLASS_NAMES, min_side=480))
    detector = load_detector(checkpoint, score_threshold=0.4)
    found = []
    for path in sorted(drawn.val_images.iterdir())[:12]:
        image = read_image(path)
        found.append(draw_detections(image, detector(image), min_side=480))
    paths = {"training images": out_dir / "training_images.jpg", "detections": out_dir / "detections.jpg"}
    _write_image(paths["training images"], image_grid(targets, columns=4, cell=480))
    _write_image(paths["detections"], image_grid(found, columns=4, cell=480))
    for number, image in enumerate(found[:4]):
        _write_image(out_dir / f"detections_{number}.jpg", image)
    return paths


def _write_image(path: Path, image: NDArray[np.uint8]) -> None:
    if not cv2.imwrite(str(path), cv2.cvtColor(image, cv2.COLOR_RGB2BGR)):
        raise OSError(f"{path}: the image could not be written")


def _twice(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Twice as high and wide: room for the labels that are drawn on the video."""
    height, width = image.shape[:2]
    return np.asarray(cv2.resize(image, (2 * width, 2 * height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _write_summary(result: QuickstartResult) -> None:
    text = {
        "AP": round(result.AP, 4),
        "AP50": round(result.AP50, 4),
        "seconds": result.seconds,
        "paths": {name: str(path) for name, path in result.paths.items()},
    }
    result.paths["summary"].write_text(json.dumps(text, indent=2) + "\n")


def _table(result: QuickstartResult) -> str:
    here = Path.cwd()
    width = max(len(name) for name in (*result.paths, *result.seconds))
    lines = ["", "what".ljust(width) + "  where"]
    for name, path in result.paths.items():
        shown = path.relative_to(here) if path.is_relative_to(here) else path
        lines.append(f"{name:<{width}}  {shown}")
    lines += ["", "part".ljust(width) + "  seconds"]
    lines += [f"{name:<{width}}  {value:7.1f}" for name, value in result.seconds.items()]
    lines += ["", f"AP {result.AP:.3f}, AP50 {result.AP50:.3f} on drawn images it did not train on"]
    logs = result.paths["TensorBoard logs"].parent
    lines.append(f"curves and images of the training: tensorboard --logdir {logs}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
