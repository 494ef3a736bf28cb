"""A detector on disk, in our own two kinds of file.

A checkpoint of a training (``best.pt``) and a ``.safetensors`` file hold the same, the latter without the state of the
training.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.errors import UserError
from backbones.state import load_state
from backbones.weights.native import write_safetensors
from detection.engine.checkpoint import load_checkpoint
from detection.models.build import build_detector
from detection.models.detector import Detector
from detection.weights.info import DetectorInfo

LAYOUT = "litedet detector"


def read_detector(path: str | Path, input_size: tuple[int, int] | None = None) -> tuple[Detector, DetectorInfo]:
    """The detector of a file, on the CPU and in evaluation mode.

    Args:
        path: a training's ``best.pt`` or ``last.pt``, or a detector's ``.safetensors``.
            Published names: see ``detection.weights.hub``.
        input_size: (height, width) in place of the one it was trained at; the anchors follow.

    Raises:
        FileNotFoundError: no such file.
        UserError: the file holds no detector, or one that does not fit its own config.
    """
    state, info = read_state(path)
    if input_size is not None:
        info.model = info.model.replaced(input_size=input_size)
    model = build_detector(info.model, len(info.class_names))
    load_state(model, state, str(path))
    return model.eval(), info


def save_detector(path: Path, model: Detector, info: DetectorInfo) -> None:
    """Write a detector as ``.safetensors``; a run that is killed leaves no half file.

    Raises:
        UserError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a detector is written as .safetensors; give the file that ending")
    metadata = {"layout": LAYOUT, "detector": json.dumps(info.to_plain(), ensure_ascii=False)}
    write_safetensors(path, model, metadata)


def holds_detector(source: str | Path) -> bool:
    """Whether a file holds a whole detector, as against a backbone or classifier, or the name of a download."""
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return _metadata(path).get("layout") == LAYOUT
    if not path.is_file():
        return False
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def read_state(path: str | Path) -> tuple[dict[str, Tensor], DetectorInfo]:
    """The tensors of a detector's file and what travels with them; see ``read_detector``."""
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        metadata = _metadata(path)
        if metadata.get("layout") != LAYOUT:
            raise UserError(
                f"{path} holds no detector (its layout is {metadata.get('layout')!r}); it may be a backbone"
            )
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return state, DetectorInfo.from_plain(json.loads(metadata["detector"]))
    content = load_checkpoint(path)
    extra: Mapping[str, Any] = content["extra"]
    if "detector" not in extra:
        raise UserError(f"{path} is a checkpoint, but not of a detector; train one with tools/train_det.py")
    return dict(content["weights"]), DetectorInfo.from_plain(extra["detector"])


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error
