"""A folder that runs without torch: an exported model, its labels, its record, and ``detect.py``, which reads them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from backbones.errors import UserError
from detection.inference.exported import SUFFIXES, open_exported

_DETECT = Path(__file__).parent / "bundle_files" / "detect.py"


def write_bundle(exported: Path, folder: Path) -> list[str]:
    """Makes the folder of an exported file.

    Args:
        exported: an ``.onnx`` or ``.tflite`` file of ``litedet export`` that gives detections.
        folder: must not exist yet; it appears whole or not at all.

    Returns:
        The names of the files in it.

    Raises:
        UserError: a file of another kind or one that ends at the raw heads, or the folder exists.
    """
    kind = SUFFIXES.get(exported.suffix.lower())
    if kind not in ("onnx", "litert"):
        raise UserError(f"{exported}: a bundle is made of an .onnx or a .tflite file")
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that does not, or remove it first")
    record = open_exported(exported).record
    if record.outputs != "detections":
        raise UserError(f"{exported} ends at the raw heads, and detect.py reads detections; export it without --raw")
    package = "onnxruntime" if kind == "onnx" else "ai-edge-litert"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".bundle-") as temporary:
        staged = Path(temporary, "bundle")
        staged.mkdir()
        shutil.copyfile(exported, staged / f"model{exported.suffix.lower()}")
        shutil.copyfile(_DETECT, staged / "detect.py")
        (staged / "labels.txt").write_text("\n".join(record.info.class_names) + "\n", encoding="utf-8")
        readable = json.dumps(json.loads(record.to_json()), ensure_ascii=False, indent=1)
        (staged / "model.json").write_text(readable + "\n", encoding="utf-8")
        (staged / "requirements.txt").write_text(f"numpy\nopencv-python-headless\n{package}\n", encoding="utf-8")
        names = sorted(path.name for path in staged.iterdir())
        os.replace(staged, folder)
    return names
