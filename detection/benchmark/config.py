"""What a benchmark is asked for."""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

from backbones.errors import UserError

Backend = Literal["torch", "compile", "onnxruntime", "openvino"]  # those of inference.runners, which loads torch
Stage = Literal[
    "predict",
    "backends",
    "postprocess",
    "folder",
    "train",
    "detectors",
    "busy",
    "loader",
    "open",
    "evaluate",
    "exports",
]
NUM_IMAGES = 96  # read from --images, or drawn
_PACKAGES: dict[Backend, tuple[str, ...]] = {
    "torch": (),
    "compile": (),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}


@dataclass(kw_only=True, slots=True)
class BenchmarkConfig:
    stages: tuple[Stage, ...] = get_args(Stage)
    """Stages to run."""
    count: bool = False
    """Print parameters, multiply-adds and activations by part, and nothing else."""
    scale: bool = False
    """Print costs per image for datasets of growing size, and nothing else."""
    out: Path = Path("runs/benchmark")
    """Folder for benchmark.json and benchmark.png."""
    weights: Path | None = None
    """A detector (best.pt, .safetensors, or a published name) with square input. None: drawn weights whose scores are
    spread as after a training on COCO, 80 classes, 320 px."""
    images: Path | None = None
    """Folder of real images; needs --annotations. None: drawn images, 640x480."""
    annotations: Path | None = None
    """COCO json of --images."""
    threads: int = 2
    """Threads of torch, of OpenCV and of the backends, on both sides."""
    rounds: int = 21
    """Runs of each side in the short stages. The long stages take a third of it, opening at most five, AP two."""
    backends: tuple[Backend, ...] = ("compile", "onnxruntime", "openvino")
    """Backends of the stages "backends", "detectors" and "folder" (which leaves out compile). The last two
    need pip install 'litedet[export]'."""
    exported: tuple[Path, ...] = ()
    """Files of litedet export, each timed in the stage "exports" in place of the int8 files that it makes itself."""
    batch_size: int = 24
    """Images per batch in the stages train, busy and loader."""
    folder_images: int = 288
    """Image files of the stage folder: links to the images in turn."""
    open_images: Annotated[int, tyro.conf.arg(aliases=["--open-pictures"])] = 118_287
    """Images of the annotation file that is opened."""
    open_boxes: int = 860_001
    """Boxes in it; with these two numbers it has the size of COCO's train2017."""
    evaluate_images: Annotated[int, tyro.conf.arg(aliases=["--evaluate-pictures"])] = 5_000
    """Images that AP is computed on, with 7.4 boxes and 100 detections each."""
    scale_sizes: tuple[int, ...] = (1_000, 10_000, 118_287)
    """Numbers of images that --scale compares."""
    cache: Path = Path(tempfile.gettempdir()) / "litedet-benchmark"
    """Folder for drawn images and annotation files; a later benchmark uses them again."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        for name in (
            "threads",
            "rounds",
            "batch_size",
            "folder_images",
            "open_images",
            "open_boxes",
            "evaluate_images",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > NUM_IMAGES:
            raise UserError(f"--batch-size {self.batch_size} is more than the {NUM_IMAGES} images that are read")
        if (self.images is None) != (self.annotations is None):
            raise UserError("--images and --annotations go together: a folder and the COCO json of its images")
        if {"backends", "detectors", "folder"} & set(self.stages):
            if "backends" in self.stages and not self.backends:
                raise UserError("the stage backends needs at least one of --backends")
            for backend in self.backends:
                for package in _PACKAGES[backend]:
                    if find_spec(package) is None:
                        raise UserError(
                            f"--backends {backend} needs the package {package}, which is not installed; "
                            "pip install 'litedet[export]', or leave it out"
                        )
        if not self.scale_sizes or min(self.scale_sizes) < 64:
            raise UserError(f"--scale-sizes must be at least 64 each, got {self.scale_sizes}")
