"""Make a file of a detector or classifier that phones, boards, recorders and servers run, verified by running it.

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
    from detection.export.run import ExportJob, ExportResult
    from detection.export.table import ExportTable
    from detection.inference.exported import Format


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    checkpoint: tyro.conf.Positional[Path]
    """A detector or a classifier: a training's best.pt, a .safetensors, or a published name."""
    to: Literal["onnx", "openvino", "litert", "torch", "executorch", "ncnn", "coreml", "bundle", "web", "all"]
    """The format. onnx and openvino need pip install 'litedet[export]', litert, executorch, ncnn and coreml an extra of their own
    name. torch, executorch, ncnn and coreml end at the raw heads. coreml is converted and its structure checked, but not
    run: that needs macOS. bundle: a folder with a model, its labels and a detect.py that needs no torch. web: a folder with a
    page that runs it in a browser. all: a folder with files of all formats whose packages are installed and a table of them
    (exports.md, exports.json)."""
    out: Path
    """The file to write: .onnx, .xml (with a .bin beside it), .tflite, .pt2, .pte, .param (with a .bin and a .json beside it) or
    .mlpackage; of bundle and web a folder, which must not exist; of all the folder, whose table is continued."""
    images: Path
    """Folder with images that the file is run on before it gets its name; with --annotations the folder of its file names."""
    annotations: Path | None = None
    """A COCO json: AP of the checkpoint and of the file are measured on it, and the drop is printed. None: no AP."""
    labelled: Path | None = None
    """Of a classifier: a folder with a folder of images for each class, or for some of them (their numbers, where the checkpoint
    has no names): top-1 of the checkpoint and of the file are measured on it, and the drop is printed. None: no top-1."""
    resize: Literal["center_crop", "squash"] | None = None
    """Of a classifier: how an image becomes square. None: as its training evaluated."""
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
    """With --to openvino, ncnn or coreml: weights stored in 16 bits."""
    compiled: bool = False
    """With --to torch: an AOTInductor package, machine code for processors like this one. Needs a C++ compiler."""
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
    enough: float = 0.002
    """The first way to quantise that loses less AP than this ends the search; the quick ones are tried first."""
    all_variants: bool = False
    """Try every known way to quantise and keep the best."""
    keep_float: tuple[str, ...] = ()
    """With --int8: layers that stay in floating point, by name, or one number N: the N that 8 bits cost most. Where the drop
    exceeds 0.01 the export names them."""


@main_errors
def main(argv: Sequence[str] | None = None) -> ExportResult | ExportTable:
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
        {"--out": None if config.to == "all" or config.out.suffix == ".mlpackage" else config.out},
    )
    if config.to == "all":
        return _all(config)
    result = _folder(config) if config.to == "bundle" or config.to == "web" else _export(config, config.to, config.out)
    print(summary(result))
    if config.to == "bundle":
        print(f"on the device: pip install -r {config.out}/requirements.txt; python {config.out}/detect.py IMAGE")
    if config.to == "web":
        if config.keep_float:
            print(
                "--keep-float: a browser adds up these layers in another order and may round differently behind them, so that "
                "boxes may be some pixels from Python's; without --keep-float they are the same"
            )
        print(
            f"look at it: python {config.out}/serve.py (or python -m http.server in it); any server of static files will do"
        )
    return result


def _export(config: ExportConfig, to: Format, out: Path) -> ExportResult:
    from detection.export.run import export

    return export(replace(_job(config, to, out), portable=config.to == "web"))


def _job(config: ExportConfig, to: Format, out: Path) -> ExportJob:
    from detection.export.run import ExportJob

    own = ("bundled", "onnxruntime_web")
    given = {name: getattr(config, name) for name in ExportConfig.__dataclass_fields__ if name not in own}
    return ExportJob(**{**given, "to": to, "out": out})


def _all(config: ExportConfig) -> ExportTable:
    from detection.export.table import export_all

    if config.int8 or config.fp16 or config.raw:
        raise UserError(
            "--to all makes every number format (int8 where --calibration is given); leave --int8, --fp16 and --raw out"
        )
    table = export_all(_job(config, "torch", config.out / "none.pt2"), config.out)
    print(f"\n{table.markdown()}\nwritten: {config.out / 'exports.md'}, {config.out / 'exports.json'}")
    return table


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
    from detection.export.run import signed

    record, chosen, name = result.record, result.chosen, result.figure_name
    outputs = getattr(record, "outputs", "logits")
    lines = [f"written: {result.path} ({chosen.size / 1e6:.2f} MB, {record.precision}, {outputs} out)"]
    if len(result.tried) > 1:
        lines.append(f"best of {len(result.tried)} variants: {chosen.name}")
    if result.drop is not None:
        lines.append(
            f"{name} {chosen.figure:.4f}, torch {result.figure_torch:.4f}, drop {signed(result.drop)} on "
            f"{record.measured.num_images} images, on {record.measured.processor}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
