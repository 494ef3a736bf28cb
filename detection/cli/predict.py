"""Detections of very many images, as Parquet shards, COCO, YOLO or VOC files: the same command again goes on after a kill.

$ litedet predict RUN/best.pt --source FOLDER|"*.jpg"|LIST.txt --out DIR
$ litedet predict RUN/best.pt --source FOLDER --out DIR --format yolo

Under torchrun each process takes its share of the shards; --engine ray spreads the work over a Ray cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from backbones.errors import UserError
from detection.engine.errors import main_errors
from detection.engine.progress import progress_bar

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.data.coco import CocoIndex
    from detection.inference.folder import Images, Shards
    from detection.inference.folder_formats import Formats
    from detection.inference.predictor import Predictor
    from detection.weights.info import DetectorInfo

Format = Literal["parquet", "coco", "yolo", "voc"]  # that of inference.folder_formats, which loads torch


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2, .pte, .param), or a
    published name (ssdlite_mobilenet_v2_coco)."""
    source: str
    """A folder (with its subfolders), a pattern ("shots/*.jpg"), or a .txt with a path on each line."""
    out: Path
    """Folder of the results; one with results of the same command is continued."""
    format: tuple[Format, ...] = ("parquet",)
    """What is written, several at once if wanted. parquet: the shards, which are always written, because the others are made
    from them. coco: detections.json (COCO's result format) and instances.json (an annotation file). yolo: labels/*.txt and
    data.yaml. voc: annotations/*.xml and classes.txt."""
    annotations: Path | None = None
    """A COCO json: its images are looked at, --source being the folder of their names, and COCO results get its ids. Boxes
    count the pixels that its boxes count, as in litedet eval. None: every image of --source, turned as EXIF says, ids from 1."""
    save_conf: bool = False
    """Write the score too in YOLO's rows (a sixth value) and VOC's objects."""
    score_threshold: float | None = None
    """Detections below it are left out. None: below the best threshold of their class where the checkpoint has them
    (litedet eval --write-thresholds), else below 0.25."""
    nms_threshold: float | None = None
    """Of two boxes of a class that overlap more (IoU), the one with the lower score goes. None: the one in the checkpoint."""
    input_size: tuple[int, int] | None = None
    """(height, width) of the network's input. None: the one it was trained at."""
    runner: Literal["torch", "compile", "onnxruntime", "openvino"] = "torch"
    """What runs the network. onnxruntime and openvino are faster on a CPU and need pip install 'litedet[export]'."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Number format of the network's convolutions. off: float32."""
    batch_size: int = 32
    """Images that the network gets at once."""
    workers: int = 2
    """Processes that decode; 0 decodes in this one. Of no effect with --engine ray, which spreads decoding itself."""
    shard_size: int = 1000
    """Images of a shard: as many are done again at most after a kill."""
    device: str = "auto"
    """Where the network runs: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    engine: Literal["local", "ray"] = "local"
    """local: this machine, or what torchrun started. ray: a Ray cluster (RAY_ADDRESS; without it one on this machine is
    started); needs pip install 'litedet[ray]'. Checkpoint, images and --out then lie where all its machines find them."""
    detectors: int | None = None
    """With --engine ray, detectors at work at once, each on a GPU or a CPU core of its own. None: one for each GPU of the
    cluster, without GPUs one for each core."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""
        if min(self.batch_size, self.shard_size) < 1 or self.workers < 0:
            raise UserError("--batch-size and --shard-size must be at least 1, --workers at least 0")
        if self.score_threshold is not None and not 0 <= self.score_threshold < 1:
            raise UserError(f"--score-threshold {self.score_threshold}: must be in [0, 1)")
        if not self.format:
            raise UserError("--format needs at least one of parquet, coco, yolo, voc")
        if self.save_conf and not {"yolo", "voc"} & set(self.format):
            raise UserError("--save-conf is for --format yolo and voc; the other formats have the score anyway")
        if self.annotations is not None and not Path(self.source).is_dir():
            raise UserError(
                f"--annotations needs the folder of its images as --source; {self.source!r} is not a folder"
            )
        if self.detectors is not None and (self.engine != "ray" or self.detectors < 1):
            raise UserError("--detectors is for --engine ray, and at least 1")
        if self.engine == "ray" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError("--engine ray spreads the work itself; start it once, without torchrun")

    def detector_options(self) -> dict[str, Any]:
        """Arguments of ``load_detector`` that change what is found, the device left out."""
        return {
            "score_threshold": self.score_threshold,
            "nms_threshold": self.nms_threshold,
            "input_size": self.input_size,
            "backend": self.runner,
            "amp": self.amp,
        }


@main_errors(stopped="stopped; the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(PredictConfig, args=argv, description=__doc__)
    config.validate()
    from backbones.state import sha256_of, write_whole
    from detection.data.coco import CocoIndex
    from detection.engine.runtime import choose_device, keep_freed_memory
    from detection.inference.exported import is_exported, sha256_of_detector
    from detection.inference.folder import Images, Shards, digest, list_images, open_folder, require_arrow
    from detection.inference.predictor import load_detector
    from detection.weights.hub import locate

    require_arrow()  # before anything is read or made
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    index = None if config.annotations is None else CocoIndex.read(config.annotations)
    if index is None:
        paths = list_images(config.source)
    else:
        paths = [os.path.join(config.source, index.file_name(position)) for position in range(len(index))]
    file = Path(locate(config.checkpoint))
    # With Ray it computes nothing here: its actors load it where they are. An exported file runs on the CPU.
    on_cpu = config.engine == "ray" or (config.device == "auto" and is_exported(file))
    device = choose_device("cpu" if on_cpu else config.device, int(os.environ.get("LOCAL_RANK", 0)))
    detector = load_detector(file, device=device, **config.detector_options())
    shards = Shards(paths=paths, out=config.out, size=config.shard_size)
    formats = _formats(config, shards, index, detector.info)
    open_folder(
        config.out,
        {
            "checkpoint": sha256_of_detector(file),
            **config.detector_options(),
            "images": len(paths),
            "list": digest(paths),
            "annotations": None if config.annotations is None else sha256_of(config.annotations),
            "shard_size": config.shard_size,
            "save_conf": config.save_conf or None,
        },
        alone=world_size == 1,
    )
    if detector.device.type == "cpu":  # a batch needs hundreds of MB, which the system would clear anew for each
        keep_freed_memory()
    images = Images(paths, detector.info.model, _dataset(config, index, detector.info))
    total = sum(len(shards.positions(shard)) for shard in shards.missing(rank, world_size))
    with progress_bar(total=total, unit="image", desc=f"predict {rank + 1}/{world_size}") as bar:
        for number in _predict(config, detector, file, shards, images, rank, world_size):
            bar.update(number)
    made = formats.write()
    reasons = shards.unreadable()
    write_whole(config.out / "unreadable.txt", "".join(f"{reason}\n" for reason in reasons).encode())
    print(f"{len(paths)} images, {len(shards) - len(shards.missing())} of {len(shards)} shards in {config.out}")
    for path in made:
        print(f"written: {path}")
    if reasons:
        print(f"{len(reasons)} images could not be read: {config.out / 'unreadable.txt'}")


def _predict(
    config: PredictConfig,
    detector: Predictor,
    file: Path,
    shards: Shards,
    images: Images,
    rank: int,
    world_size: int,
) -> Iterator[int]:
    if config.engine == "ray":
        from detection.inference.cluster import predict_on_ray

        options = {**config.detector_options(), "device": config.device}
        return predict_on_ray(file, options, shards, images, batch_size=config.batch_size, detectors=config.detectors)
    from detection.inference.folder import predict_shards

    return predict_shards(
        detector,
        shards,
        images,
        batch_size=config.batch_size,
        workers=config.workers,
        rank=rank,
        world_size=world_size,
    )


def _dataset(config: PredictConfig, index: CocoIndex | None, info: DetectorInfo) -> Any:
    """The images as an annotation file has them; None where there is none."""
    if index is None:
        return None
    from detection.data.augment import EvalTransform
    from detection.data.dataset import DetectionDataset

    return DetectionDataset(index, config.source, EvalTransform(info.model.input_size))


def _formats(config: PredictConfig, shards: Shards, index: CocoIndex | None, info: DetectorInfo) -> Formats:
    import numpy as np

    from detection.inference.folder_formats import Formats

    category_ids = np.array(info.category_ids, np.int64)
    if index is None:
        folders = [os.path.dirname(os.path.abspath(path)) for path in shards.paths]
        root = Path(config.source) if Path(config.source).is_dir() else Path(os.path.commonpath(folders))
        image_ids = np.arange(1, len(shards.paths) + 1)
    else:
        root, image_ids = Path(config.source), index.image_ids
        category_ids = index.select(class_names=()).with_categories(category_ids, info.class_names).category_ids
    return Formats(
        wanted=config.format,
        shards=shards,
        root=root,
        class_names=info.class_names,
        category_ids=category_ids,
        image_ids=image_ids,
        with_scores=config.save_conf,
    )


if __name__ == "__main__":  # torchrun -m
    main()
