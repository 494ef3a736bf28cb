"""Object detection with a MobileNetV2 backbone and an SSDLite head."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.evaluation.table import DetectionTable
    from detection.images.draw import draw_detections
    from detection.inference.predictor import Predictor, load_detector
    from detection.structures import Detections

# Threads of torch's operators wait for each other in a loop, and where another process has a core they wait for one that does
# not run: on two cores with one busy a prediction of 17 ms took 44. GNU's OpenMP, which torch has on Linux, reads how long to
# loop before sleeping when torch is loaded. 1,000 rounds cost a prediction a tenth on a quiet machine (17.6 in place of 15.1 ms),
# and with one core busy it takes 30 ms, with 5,000 rounds 52, with 20,000 some 100. To sleep at once (OMP_WAIT_POLICY=PASSIVE)
# costs up to a third of a small prediction on a quiet machine.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "1000"

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
