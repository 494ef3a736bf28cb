"""Detections of very many images, as Parquet shards: the same command again goes on after a kill.

$ litedet predict RUN/best.pt --source FOLDER|"*.jpg"|LIST.txt --out DIR

Under torchrun each process takes its share of the shards.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

from backbones.errors import UserError
from detection.engine.errors import main_errors


@dataclass(kw_only=True, slots=True)
class PredictConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, a file of litedet export (.onnx, .xml, .tflite, .pt2, .pte, .param), or a
    published name (ssdlite_mobilenet_v2_coco)."""
    source: str
    """A folder (with its subfolders), a pattern ("shots/*.jpg"), or a .txt with a path on each line."""
    out: Path
    """Folder of the shards; one with shards of the same command is continued."""
    score_threshold: float = 0.25
    """Detections below it are left out."""
    batch_size: int = 32
    """Images that the network gets at once."""
    workers: int = 2
    """Processes that decode; 0 decodes in this one."""
    shard_size: int = 1000
    """Images of a shard: as many are done again at most after a kill."""
    device: str = "auto"
    """Where the network runs: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        if min(self.batch_size, self.shard_size) < 1 or self.workers < 0:
            raise UserError("--batch-size and --shard-size must be at least 1, --workers at least 0")
        if not 0 <= self.score_threshold < 1:
            raise UserError(f"--score-threshold {self.score_threshold}: must be in [0, 1)")


@main_errors(stopped="stopped; the same command goes on")
def main(argv: Sequence[str] | None = None) -> None:
    config = tyro.cli(PredictConfig, args=argv, description=__doc__)
    config.validate()
    from backbones.state import sha256_of
    from detection.engine.runtime import choose_device
    from detection.inference.exported import files_of, is_exported
    from detection.inference.folder import digest, list_images, missing_shards, open_folder, predict_shards, unreadable
    from detection.inference.predictor import load_detector
    from detection.weights.hub import locate

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    paths = list_images(config.source)
    file = Path(locate(config.checkpoint))
    exported = is_exported(file)  # runs on the CPU, on a machine with GPUs too
    detector = load_detector(
        file,
        device=config.device if exported else choose_device(config.device, int(os.environ.get("LOCAL_RANK", 0))),
        score_threshold=config.score_threshold,
    )
    identity = {
        "checkpoint": "".join(sha256_of(one) for one in files_of(file)) if exported else sha256_of(file),
        "score_threshold": config.score_threshold,
        "images": len(paths),
        "list": digest(paths),
        "shard_size": config.shard_size,
    }
    open_folder(config.out, identity)
    missing = missing_shards(config.out, len(paths), config.shard_size, rank, world_size)
    total = sum(len(paths[shard * config.shard_size : (shard + 1) * config.shard_size]) for shard in missing)
    with tqdm(total=total, unit="image", dynamic_ncols=True, desc=f"predict {rank + 1}/{world_size}") as bar:
        for number in predict_shards(
            detector,
            paths,
            config.out,
            shard_size=config.shard_size,
            batch_size=config.batch_size,
            workers=config.workers,
            rank=rank,
            world_size=world_size,
        ):
            bar.update(number)
    num_shards = len(list(config.out.glob("shard-*.parquet")))
    reasons = unreadable(config.out)
    from backbones.state import write_whole

    write_whole(config.out / "unreadable.txt", "".join(f"{reason}\n" for reason in reasons).encode())
    print(f"{len(paths)} images, {num_shards} of {-(-len(paths) // config.shard_size)} shards in {config.out}")
    if reasons:
        print(f"{len(reasons)} images could not be read: {config.out / 'unreadable.txt'}")
