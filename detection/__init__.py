"""Object detection with a MobileNetV2 backbone and an SSDLite head."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.evaluation.table import DetectionTable
    from detection.images.draw import draw_detections
    from detection.inference.predictor import Predictor, load_detector
    from detection.structures import Detections

__all__ = ["DetectionTable", "Detections", "Predictor", "draw_detections", "load_detector"]

_MODULES = {
    "DetectionTable": "detection.evaluation.table",
    "Detections": "detection.structures",
    "Predictor": "detection.inference.predictor",
    "draw_detections": "detection.images.draw",
    "load_detector": "detection.inference.predictor",
}


def __getattr__(name: str) -> Any:
    # On first use: the training engine, which knows no detection, then imports without what detection needs.
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'detection' has no attribute {name!r}")
