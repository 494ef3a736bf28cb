"""The machine and the versions that measured figures depend on."""

import contextlib
import os
import platform
from importlib.metadata import version
from pathlib import Path


def environment(threads: int) -> dict[str, str]:
    """What the figures depend on."""
    packages = ("torch", "torchvision", "opencv-python", "pycocotools", "faster-coco-eval", "onnxruntime", "openvino")
    versions = []
    for name in packages:
        with contextlib.suppress(ModuleNotFoundError):  # an extra that is not installed
            versions.append(f"{name} {version(name)}")
    return {
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, threads on both sides: {threads} (torch.set_num_threads({threads}))",
        "python": platform.python_version(),
        "versions": ", ".join(versions),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'unknown'} ({platform.machine()}, {platform.system()})"
