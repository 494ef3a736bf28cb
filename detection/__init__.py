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
# not run. GNU's OpenMP, which torch has on Linux, reads how long to loop before sleeping when torch is loaded. Milliseconds of a
# prediction on two cores by rounds of the loop, on a quiet machine and with one core busy:
#     1,000: 17 to 23, 28 to 33     2,000: 13 to 17, 36 to 41     3,000: 14 to 15, 42 to 45     10,000: 13 to 14, 77 to 87
# A training step beside a busy process takes as long with 2,000 as with 1,000, and a quarter less than with torch's own 300,000.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "2000"

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
