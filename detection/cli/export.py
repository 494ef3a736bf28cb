"""Make a file of a detector that phones, boards, recorders and servers run, verified by running it.

$ litedet export RUN/best.pt --to onnx --images DIR --out FILE.onnx
$ litedet export RUN/best.pt --to litert --int8 --calibration DIR --annotations FILE --images DIR --out FILE.tflite
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.export.run import ExportResult


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, or a published name."""
    to: Literal["onnx", "openvino", "litert", "torch", "bundle"]
    """The format. onnx and openvino need pip install 'litedet[export]', litert pip install 'litedet[litert]'. bundle: a folder
    with a model, its labels and a detect.py that needs no torch."""
    out: Path
    """The file to write: .onnx, .xml (with a .bin beside it), .tflite or .pt2; of a bundle the folder, which must not exist."""
    images: Path
    """Folder with images that the file is run on before it gets its name; with --annotations the folder of its file names."""
    annotations: Path | None = None
    """A COCO json: AP of the checkpoint and of the file are measured on it, and the drop is printed. None: no AP."""
    bundled: Literal["onnx", "litert"] = "onnx"
    """With --to bundle: the format of the model in it."""
    raw: bool = False
    """Stop at the raw heads (box codes and class logits). Otherwise the file decodes, suppresses and gives detections."""
    int8: bool = False
    """Weights and activations in 8 bits."""
    calibration: Path | None = None
    """With --int8: folder with images like those it will see, other ones than those it is measured on."""
    num_calibration: int = 64
    """Images of that folder that are used."""
    num_verification: int = 16
    """Images that are compared with torch one by one."""
    fp16: bool = False
    """With --to openvino: weights stored in 16 bits."""
    input_size: tuple[int, int] | None = None
    """(height, width) of the network's input. None: the one it was trained at."""
    score_threshold: float | None = None
    """Inside a file that suppresses: detections at or below it are dropped. None: the one in the checkpoint."""
    nms_threshold: float | None = None
    """Inside a file that suppresses: IoU above which the lower score goes. None: the one in the checkpoint."""
    max_detections: int = 100
    """Inside a file that suppresses: detections of an image at most."""
    max_drop: float = 0.05
    """An int8 file that loses more AP than this is not written."""
    all_variants: bool = False
    """Try every known way to quantise. Otherwise the first that loses less than 0.002 AP ends the search."""


@main_errors
def main(argv: Sequence[str] | None = None) -> ExportResult:
    config = tyro.cli(ExportConfig, args=sys.argv[1:] if argv is None else argv, description=__doc__)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    refuse_overwrites(
        {
            "the checkpoint": config.checkpoint,
            "--annotations": config.annotations,
            "--images": config.images,
            "--calibration": config.calibration,
        },
        {"--out": config.out},
    )
    if config.to == "bundle":
        return _bundle(config)
    return _export(config, config.out)


def _export(config: ExportConfig, out: Path) -> ExportResult:
    from detection.export.run import ExportJob, export

    given = {name: getattr(config, name) for name in ExportConfig.__dataclass_fields__ if name != "bundled"}
    to = config.bundled if config.to == "bundle" else config.to
    result = export(ExportJob(**{**given, "to": to, "out": out}))
    print(summary(result))
    return result


def _bundle(config: ExportConfig) -> ExportResult:
    from detection.export.bundle import write_bundle

    if config.raw:
        raise UserError("--to bundle reads detections; leave --raw out")
    if config.out.exists():  # said before the minutes that an export takes
        raise UserError(f"{config.out} exists; name a folder that does not, or remove it first")
    with tempfile.TemporaryDirectory() as folder:
        result = _export(config, Path(folder, "model.onnx" if config.bundled == "onnx" else "model.tflite"))
        names = write_bundle(result.path, config.out)
    print(f"bundle: {config.out} ({', '.join(names)})")
    print(f"on the device: pip install -r {config.out}/requirements.txt; python {config.out}/detect.py IMAGE")
    return result


def summary(result: ExportResult) -> str:
    """What was written, in lines."""
    record, chosen = result.record, result.chosen
    lines = [f"written: {result.path} ({chosen.size / 1e6:.2f} MB, {record.precision}, {record.outputs} out)"]
    if len(result.tried) > 1:
        lines.append(f"best of {len(result.tried)} variants: {chosen.name}")
    if chosen.ap is not None and result.ap_torch is not None:
        lines.append(
            f"AP {chosen.ap:.4f}, torch {result.ap_torch:.4f}, drop {result.ap_torch - chosen.ap:+.4f} on "
            f"{record.measured.num_images} images, on {record.measured.processor}"
        )
    return "\n".join(lines)
