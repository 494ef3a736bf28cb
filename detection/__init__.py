"""Object detection with a MobileNetV2 backbone and an SSDLite head."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.inference.predictor import Predictor, load_detector
    from detection.structures import Detections

__all__ = ["Detections", "Predictor", "load_detector"]


def __getattr__(name: str) -> Any:
    # On first use: the training engine, which knows no detection, then imports without what detection needs.
    if name == "Detections":
        from detection.structures import Detections

        return Detections
    if name in __all__:
        from detection.inference import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module 'detection' has no attribute {name!r}")
