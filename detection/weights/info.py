"""What travels with a detector's weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backbones.errors import UserError
from detection.engine.plain import from_plain, to_plain
from detection.models.build import config_type
from detection.models.detector import DetectorConfig
from detection.postprocess import PostprocessConfig


@dataclass(kw_only=True, slots=True)
class DetectorInfo:
    """What has to travel with a detector's weights so that they can be used.

    Attributes:
        model: how the network is built.
        postprocess: how its predictions become detections in an evaluation.
        class_names: name of each label.
        category_ids: id of each label in the annotation files it learnt from.
        source: where the weights come from.
        licence: what may be done with them, as far as known.
        thresholds: of each class, the score from which on detections are worth showing, as an evaluation found it
            (``litedet eval --write-thresholds``); () where none did. Evaluations do not use them.
        quantize: "int8": the weights are those of a ``QuantizedDetector``, with its ranges.
    """

    model: DetectorConfig
    postprocess: PostprocessConfig
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str = ""
    licence: str = ""
    thresholds: tuple[float, ...] = ()
    quantize: Literal["off", "int8"] = "off"

    def to_plain(self) -> dict[str, Any]:
        """Dicts, lists, numbers and texts, fit for json and for a checkpoint."""
        return to_plain(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], source: str | Path = "") -> "DetectorInfo":
        """The inverse of ``to_plain``.

        Args:
            plain: of this version or one before.
            source: the file, for the message.

        Raises:
            UserError: a kind of detector or a field that this version does not know, or a value of another type.
        """
        info = from_plain(plain, cls, {DetectorConfig: config_type}, source)
        if len(info.class_names) != len(info.category_ids):
            raise UserError(f"{source}: {len(info.class_names)} class names and {len(info.category_ids)} category ids")
        if info.thresholds and len(info.thresholds) != len(info.class_names):
            raise UserError(f"{source}: {len(info.class_names)} class names and {len(info.thresholds)} thresholds")
        return info
