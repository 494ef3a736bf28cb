"""Exported classifiers: what travels with a file, and how it is run.

Letters in shapes: B batch, K classes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from backbones.errors import UserError
from backbones.weights.info import WeightsInfo
from detection.classification.config import TransformConfig
from detection.classification.data import EvalTransform
from detection.engine.plain import from_plain, to_plain
from detection.inference.exported import CLASSIFICATION, Format, Precision, input_dtype, open_file, parse_record
from detection.inference.inputs import Image, to_array
from detection.inference.runners import FileRunner


@dataclass(kw_only=True, slots=True)
class MeasuredAccuracy:
    """What an exported classifier was measured to do, and where.

    Attributes:
        top1: share of the images whose class the file has in the first place; None where it was not measured.
        top1_torch: that of the checkpoint in torch, on the same images.
        num_images: how many images that were.
        images: name of their folder.
        processor: what ran it: an int8 file may give other results on another one.
        milliseconds: shortest time of one image through the file.
    """

    top1: float | None = None
    top1_torch: float | None = None
    num_images: int = 0
    images: str = ""
    processor: str = ""
    milliseconds: float | None = None


@dataclass(kw_only=True, slots=True)
class ClassifierRecord:
    """What travels with an exported classifier. Its one output is ``logits``, float32 [B, K].

    Attributes:
        format: which library's file it is.
        precision: number format of the weights and, for int8, of the activations.
        variant: how it was quantised; "" for a file in floating point.
        info: names, normalisation, source, licence.
        transform: how an image becomes the input: the fields that begin with ``eval``.
        num_classes: K.
        layout: order of the axes of the uint8 input.
        kept_float: layers of an int8 file that stay in floating point.
        versions: of the packages that made it.
        checkpoint_sha256: of the file it was made of.
        measured: what it was measured to do.
    """

    format: Format
    precision: Precision = "float32"
    variant: str = ""
    info: WeightsInfo
    transform: TransformConfig
    num_classes: int
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    kept_float: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    checkpoint_sha256: str = ""
    measured: MeasuredAccuracy = field(default_factory=MeasuredAccuracy)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label; its number where the checkpoint knows none."""
        return self.info.class_names or tuple(map(str, range(self.num_classes)))

    def to_json(self) -> str:
        """The record as json, with what other programs want to know at the top."""
        side = self.transform.eval_size
        readable = {
            "task": CLASSIFICATION,
            "input": {
                "layout": self.layout,
                "dtype": input_dtype(self.format),
                "colour": "RGB",
                "height": side,
                "width": side,
                "resize": self.transform.eval_resize,
                "crop_share": self.transform.eval_crop_share,
                "normalisation": "inside the file",
            },
            "names": list(self.class_names),
        }
        return json.dumps({**readable, "record": to_plain(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, source: str | Path) -> ClassifierRecord:
        """The inverse of ``to_json``.

        Raises:
            UserError: text of another kind, a detector's among them, or of a later version.
        """
        content = parse_record(text, source)
        if content.get("task") != CLASSIFICATION:
            raise UserError(f"{source} holds no classifier; for an exported detector there is load_detector")
        record = from_plain(content["record"], cls, source=source)
        record.transform.validate()
        return record


class ExportedClassifier:
    """An exported classifier, ready to use: images in, logits out.

    Args:
        runner: runs the file.
        record: what travelled with it.
    """

    def __init__(self, runner: FileRunner, record: ClassifierRecord) -> None:
        self.runner = runner
        self.record = record
        self._transform = EvalTransform(record.transform)

    def __call__(self, images: Image | list[Image]) -> Tensor:
        """Class logits float32 [B, K] of an image (B = 1; see ``Image``) or a list of them.

        Raises:
            FileNotFoundError, UserError: an image that is not there or does not decode.
        """
        arrays = [to_array(image) for image in (images if isinstance(images, list) else [images])]
        pixels = np.stack([self._transform(array, 0, 0) for array in arrays])
        return self.logits(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    def logits(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] at the input size -> float32 [B, K]."""
        parts = images.split(self.runner.max_batch or len(images))
        return torch.cat([torch.from_numpy(self.runner.outputs(part)[0]) for part in parts])


def open_classifier(path: str | Path) -> ExportedClassifier:
    """A classifier that ``litedet export`` wrote, to run on the CPU.

    Raises:
        FileNotFoundError: no such file.
        UserError: no exported classifier of ours, damaged, or the package that runs it is missing.
    """
    text, make = open_file(path)
    if text is None:
        raise UserError(f"{path} has no record of LiteDet inside; files of litedet export have one")
    record = ClassifierRecord.from_json(text, path)
    side = record.transform.eval_size
    return ExportedClassifier(make(torch.zeros(0, 4), (side, side)), record)
