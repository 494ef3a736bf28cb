"""What travels with the weights of a backbone or classifier, and how it stands in the metadata of a .safetensors file."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from backbones.mobilenetv2 import MobileNetV2Config

LAYOUT = "litedet"


@dataclass(kw_only=True, slots=True)
class WeightsInfo:
    """What has to travel with weights so that they can be used.

    Attributes:
        mean: per RGB channel, in units of pixel / 255, subtracted from an image.
        std: per RGB channel, in units of pixel / 255; an image is divided by it after the mean was subtracted.
        class_names: name of each output of the classifier, empty where nobody knows them.
        source: where the weights come from.
        licence: what may be done with them, as far as known.
        layout: whose layout the weights came in: "litedet", "torchvision", "timm", "tflite".
        padding: the padding mode that the weights were trained with.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    class_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    layout: str = "litedet"
    padding: str = "symmetric"

    def to_metadata(self, config: MobileNetV2Config) -> dict[str, str]:
        """The texts that a file's metadata holds.

        Args:
            config: of the backbone.
        """
        return {
            "layout": LAYOUT,
            "original_layout": self.layout,
            "backbone": json.dumps(asdict(config)),
            "padding": config.padding,
            "mean": json.dumps(self.mean),
            "std": json.dumps(self.std),
            "class_names": json.dumps(self.class_names, ensure_ascii=False),
            "source": self.source,
            "licence": self.licence,
        }


def from_metadata(metadata: Mapping[str, str], path: Path) -> tuple[WeightsInfo, MobileNetV2Config]:
    """The inverse of ``WeightsInfo.to_metadata``.

    Args:
        metadata: of this version or one before.
        path: of the file, for the message.

    Raises:
        UserError: something is missing, makes no sense, or is a field of the backbone that this version does not know.
    """
    try:
        config = _config(json.loads(metadata["backbone"]))
        config.validate()
        info = WeightsInfo(
            mean=_three(metadata["mean"]),
            std=_three(metadata["std"]),
            class_names=tuple(map(str, json.loads(metadata["class_names"]))),
            source=metadata["source"],
            licence=metadata["licence"],
            layout=metadata.get("original_layout", LAYOUT),
            padding=metadata["padding"],
        )
    except UserError as error:
        raise UserError(f"{path}: its metadata cannot be used: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({type(error).__name__}: {error})") from error
    return info, config


def _config(plain: dict[str, Any]) -> MobileNetV2Config:
    # detection.engine.plain does the same for every config; this package stands below it.
    values: dict[str, Any] = {}
    defaults = {field.name: field.default for field in fields(MobileNetV2Config)}
    for name, value in plain.items():
        new = name if name in defaults else MobileNetV2Config.renamed_fields.get(name, name)
        if new is None:
            continue
        if new not in defaults:
            raise UserError(
                f"unknown field backbone.{name}; it was written by another version of this project, or by hand"
            )
        if new == "settings":
            value = tuple(tuple(row) for row in value)
        default = defaults[new]
        if not isinstance(value, float | int if isinstance(default, float) else type(default)):
            raise UserError(f"backbone.{name} is {value!r}; expected is a {type(default).__name__}")
        values[new] = value
    return MobileNetV2Config(**values)


def _three(text: str) -> tuple[float, float, float]:
    red, green, blue = json.loads(text)
    return float(red), float(green), float(blue)
