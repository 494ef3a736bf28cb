"""What the folders have in common that an exported model goes out in: the model, its labels, its record in json."""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from backbones.errors import UserError
from detection.inference.exported import SUFFIXES, Format, open_exported


def model_files(exported: Path, kinds: Sequence[Format]) -> dict[str, bytes]:
    """The model (``model.onnx`` or ``model.tflite``), ``labels.txt`` and ``model.json``, by name.

    Args:
        exported: a file of ``litedet export`` that gives detections.
        kinds: the formats that will do.

    Raises:
        UserError: a file of another kind, or one that ends at the raw heads.
    """
    kind = SUFFIXES.get(exported.suffix.lower())
    if kind not in kinds:
        wanted = " or ".join(suffix for suffix, one in SUFFIXES.items() if one in kinds)
        raise UserError(f"{exported}: this is made of a file that ends in {wanted}")
    record = open_exported(exported).record
    if record.outputs != "detections":
        raise UserError(f"{exported} ends at the raw heads, and detections are needed; export it without --raw")
    readable = json.dumps(json.loads(record.to_json()), ensure_ascii=False, indent=1)
    return {
        f"model{exported.suffix.lower()}": exported.read_bytes(),
        "labels.txt": ("\n".join(record.info.class_names) + "\n").encode(),
        "model.json": (readable + "\n").encode(),
    }


def write_folder(folder: Path, content: Mapping[str, bytes]) -> list[str]:
    """Makes a folder; it appears whole or not at all.

    Args:
        folder: must not exist yet.
        content: of each file, by its path in the folder, with "/" between the parts.

    Returns:
        The paths, sorted.

    Raises:
        UserError: the folder exists.
    """
    refuse_existing(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        staged = Path(temporary, "folder")
        for name, data in content.items():
            path = staged / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        os.replace(staged, folder)
    return sorted(content)


def refuse_existing(folder: Path) -> None:
    """Raises UserError where there is something of that name."""
    if folder.exists():
        raise UserError(f"{folder} exists; name a folder that does not, or remove it first")
