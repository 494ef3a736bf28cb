"""The composed config of a training, and how a recipe becomes one.

A recipe is a Python function without arguments that returns a config; it is named as ``configs/coco.py:ssdlite_mnv2_320``.
The command line overrides any field by its dotted name.
"""

import importlib.util
import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import tyro

from detection.data.augment import AugmentConfig
from detection.engine.trainer import TrainConfig
from detection.losses import LossConfig
from detection.model import DetectorConfig
from detection.postprocess import PostprocessConfig


@dataclass(kw_only=True, slots=True)
class SplitConfig:
    annotations: Path | None = None
    """A COCO json. Other formats: tools/convert_dataset.py."""
    images: Path | None = None
    """The folder that the file names in it start from."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    root: Path | None = None
    """Relative paths of the splits start here."""
    train: SplitConfig = field(default_factory=SplitConfig)
    """Images to learn from."""
    val: SplitConfig = field(default_factory=SplitConfig)
    """Images to measure AP on."""
    workers: int = 2
    """Processes that read and augment images. 0: the training process itself."""
    val_batch_size: int = 16
    """Images of a batch in evaluation, per process. It changes speed and memory, not AP."""

    def split(self, name: str) -> tuple[Path, Path]:
        """(annotation file, image folder) of ``train`` or ``val``, under ``root``."""
        split: SplitConfig = getattr(self, name)
        for what, value in (("annotations", split.annotations), ("images", split.images)):
            if value is None:
                raise ValueError(f"no --data.{name}.{what} given; it is needed to train")
        root = self.root or Path()
        return root / cast(Path, split.annotations), root / cast(Path, split.images)


@dataclass(kw_only=True, slots=True)
class DetectionConfig:
    run_dir: Path = Path("runs/detector")
    """Folder for everything that the training writes."""
    weights: str | None = None
    """Where to start: a detector (a checkpoint, .safetensors), a backbone or classifier (ours, torchvision's, timm's), or a
    published name (tools/convert_weights.py --list). The network is then built as these weights need it."""
    weights_part: Literal["all", "backbone"] = "all"
    """Of a whole detector: everything, or the backbone alone under a new head with the config's taps and anchors."""
    backbone_lr_scale: float = 1.0
    """Factor of the learning rate in the backbone, which is trained already."""
    model: DetectorConfig = field(default_factory=DetectorConfig)
    """The network."""
    loss: LossConfig = field(default_factory=LossConfig)
    """What it is told."""
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    """How its predictions become detections."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """How training images are changed."""
    data: DataConfig = field(default_factory=DataConfig)
    """Which images."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """How long, how fast, on what."""

    def validate(self) -> None:
        """Raises ValueError for values that make no sense, alone or together. Called once, after all overrides."""
        for part in (self.model, self.model.backbone, self.loss, self.postprocess, self.augment, self.train):
            part.validate()
        if self.data.workers < 0 or self.data.val_batch_size < 1:
            raise ValueError(
                f"data.workers must be at least 0 and data.val_batch_size at least 1, got {self.data.workers} and "
                f"{self.data.val_batch_size}"
            )
        if self.backbone_lr_scale <= 0:
            raise ValueError(
                f"backbone_lr_scale must be positive, got {self.backbone_lr_scale}; model.backbone.frozen_stages freezes"
            )
        self.model.check_loss(self.loss)


def load_config(argv: Sequence[str], description: str) -> Any:
    """The config of a tool's command line: the recipe, then overrides.

    Args:
        argv: ``FILE.py:FUNCTION`` and any ``--dotted.field VALUE``. ``--help`` after the recipe lists every field.
        description: of the tool, for ``--help``.

    Returns:
        What the recipe returns, with the overrides.

    Raises:
        ValueError: no such recipe.
        SystemExit: ``--help``, or an override that names no field or has a value of another type; tyro says which.
    """
    if not argv or argv[0].startswith("-"):
        print(f"usage: {Path(sys.argv[0]).name} FILE.py:FUNCTION [--FIELD VALUE ...]\n\n{description}")
        print("\nThe fields are listed by --help after the recipe. Recipes are in configs/.")
        raise SystemExit(0 if argv and argv[0] in ("-h", "--help") else 2)
    default = _recipe(argv[0])()
    return tyro.cli(
        type(default),
        default=default,
        args=list(argv[1:]),
        prog=f"{Path(sys.argv[0]).name} {argv[0]}",
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )


def _recipe(spec: str) -> Any:
    path, colon, name = spec.rpartition(":")
    if not colon or not path.endswith(".py"):
        raise ValueError(f"{spec!r} names no recipe; give FILE.py:FUNCTION, as configs/finetune.py:detector")
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no recipe file {path} (looked in {Path.cwd()})")
    # By file, not by import: a user's own recipe may lie anywhere.
    module_spec = importlib.util.spec_from_file_location(f"recipes_of_{file.stem}", file)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    recipes = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if name not in recipes:
        raise ValueError(f"{path} has no recipe {name!r}; it has: {', '.join(recipes) or 'none'}")
    return getattr(module, name)
