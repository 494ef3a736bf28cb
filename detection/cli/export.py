"""Make a file of a detector that phones, boards, recorders and servers run, verified by running it.

$ litedet export RUN/best.pt --to onnx --images DIR --out FILE.onnx
$ litedet export RUN/best.pt --to litert --int8 --calibration DIR --annotations FILE --images DIR --out FILE.tflite
"""

from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.export.run import ExportResult
    from detection.inference.exported import Format


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A training's best.pt, a detector's .safetensors, or a published name."""
    to: Literal["onnx", "openvino", "litert", "torch", "bundle", "web"]
    """The format. onnx and openvino need pip install 'litedet[export]', litert pip install 'litedet[litert]'. bundle: a folder
    with a model, its labels and a detect.py that needs no torch. web: a folder with a page that runs it in a browser."""
    out: Path
    """The file to write: .onnx, .xml (with a .bin beside it), .tflite or .pt2; of bundle and web a folder that does not exist."""
    images: Path
    """Folder with images that the file is run on before it gets its name; with --annotations the folder of its file names."""
    annotations: Path | None = None
    """A COCO json: AP of the checkpoint and of the file are measured on it, and the drop is printed. None: no AP."""
    bundled: Literal["onnx", "litert"] = "onnx"
    """With --to bundle: the format of the model in it."""
    onnxruntime_web: str | None = None
    """With --to web: version of onnxruntime-web, which npm fetches, or the .tgz of "npm pack onnxruntime-web". None: the version
    that the page was tested with."""
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
    if config.to in ("bundle", "web"):
        from detection.export.folder import refuse_existing

        if config.raw:
            raise UserError(f"--to {config.to} reads detections; leave --raw out")
        refuse_existing(config.out)
    if config.onnxruntime_web is not None and config.to != "web":
        raise UserError(f"--onnxruntime-web is for --to web, not {config.to}")
    refuse_overwrites(
        {
            "the checkpoint": config.checkpoint,
            "--annotations": config.annotations,
            "--images": config.images,
            "--calibration": config.calibration,
        },
        {"--out": config.out},
    )
    result = _folder(config) if config.to == "bundle" or config.to == "web" else _export(config, config.to, config.out)
    print(summary(result))
    if config.to == "bundle":
        print(f"on the device: pip install -r {config.out}/requirements.txt; python {config.out}/detect.py IMAGE")
    if config.to == "web":
        print(
            f"look at it: python {config.out}/serve.py (or python -m http.server in it); any server of static files will do"
        )
    return result


def _export(config: ExportConfig, to: Format, out: Path) -> ExportResult:
    from detection.export.run import ExportJob, export

    own = ("bundled", "onnxruntime_web")
    given = {name: getattr(config, name) for name in ExportConfig.__dataclass_fields__ if name not in own}
    return export(ExportJob(**{**given, "to": to, "out": out}))


def _folder(config: ExportConfig) -> ExportResult:
    """A bundle or a page. What a page is run by is looked at before the minutes that an export takes."""
    from detection.export.bundle import write_bundle
    from detection.export.web import write_page
    from detection.export.web_runtime import locate_runtime, runtime_files

    runtime = None
    if config.to == "web":
        runtime = locate_runtime(config.onnxruntime_web)
        runtime_files(runtime)
    with tempfile.TemporaryDirectory() as folder:
        name = "model.tflite" if config.to == "bundle" and config.bundled == "litert" else "model.onnx"
        result = _export(config, "litert" if name.endswith(".tflite") else "onnx", Path(folder, name))
        if runtime is None:
            write_bundle(result.path, config.out)
        else:
            write_page(result.path, config.out, runtime)
    return replace(result, path=config.out / name)


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
