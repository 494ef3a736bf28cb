"""Exported files as runners: what travels with them, how it is read, and which library runs which file.

A file says by its ending which format it is and by its record (``ExportRecord``) everything else. Letters in shapes: B batch,
A anchors, K detections, C columns of class logits, D numbers of a box code.
"""

from __future__ import annotations

import contextlib
import json
import queue
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from backbones.errors import UserError
from backbones.state import existing_file, sha256_of
from detection.engine.plain import from_plain, to_plain
from detection.engine.quiet import quiet
from detection.inference.edge_runners import AotRunner, ExecuTorchRunner, NcnnRunner
from detection.inference.runners import FileRunner, OnnxRuntimeRunner, OpenVinoRunner, openvino_core
from detection.models.build import build_detector, config_type
from detection.models.detector import DetectorConfig
from detection.postprocess import to_image
from detection.structures import Detections, RawPredictions, Runner
from detection.weights.info import DetectorInfo

Format = Literal["onnx", "openvino", "litert", "torch", "executorch", "ncnn", "coreml"]
Outputs = Literal["raw", "detections"]
Precision = Literal["float32", "float16 weights", "int8"]

SUFFIXES: dict[str, Format] = {
    ".onnx": "onnx",
    ".xml": "openvino",
    ".tflite": "litert",
    ".pt2": "torch",
    ".pte": "executorch",
    ".param": "ncnn",
    ".mlpackage": "coreml",
}
"""Ending of an exported file -> its format. OpenVINO's and ncnn's weights lie beside it in a .bin of the same name."""
EXTRAS: dict[Format, str] = {"litert": "litert", "executorch": "executorch", "ncnn": "ncnn", "coreml": "coreml"}
"""Format -> the extra that makes and runs it, where that is not "export"."""


def input_dtype(kind: Format) -> str:
    """Number format of a file's input, whose numbers are 0..255; ncnn knows no integers there."""
    return "float32" if kind == "ncnn" else "uint8"


KEY = "litedet"
"""Name of the record in ONNX's metadata_props, OpenVINO's rt_info, Core ML's metadata and torch.export's extra files."""
RECORD_NAME = "litedet.json"
"""Name of the record in the zip archive at the end of a .tflite or .pte file."""


CLASSIFICATION = "classification"
"""``task`` of a classifier's record; a detector's names none."""


def parse_record(text: str | bytes, source: str | Path) -> dict[str, Any]:
    """The json of a record of either kind, as a mapping that has a ``record``.

    Raises:
        UserError: something else.
    """
    try:
        content = json.loads(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: its record cannot be read ({error})") from error
    if not isinstance(content, dict) or "record" not in content:
        raise UserError(f"{source}: its record cannot be read (it is json of another kind)")
    return content


@dataclass(kw_only=True, slots=True)
class Measured:
    """What an exported file was measured to do, and where.

    Attributes:
        ap: COCO AP of the file; None where it was not measured.
        ap_torch: COCO AP of the checkpoint in torch on the same images.
        num_images: how many images that were.
        annotations: name of the annotation file.
        processor: what ran it: an int8 file may give other results on another one.
        milliseconds: shortest time of one image through the file.
    """

    ap: float | None = None
    ap_torch: float | None = None
    num_images: int = 0
    annotations: str = ""
    processor: str = ""
    milliseconds: float | None = None


@dataclass(kw_only=True, slots=True)
class ExportRecord:
    """What travels with an exported file.

    Attributes:
        format: which library's file it is.
        outputs: "raw" are box codes [B, A, D] and class logits [B, A, C]; "detections" are finished boxes.
        precision: number format of the weights and, for int8, of the activations.
        variant: how it was quantised; "" for a file in floating point.
        info: how images are placed, normalisation, names, thresholds, anchors or strides, box coder.
        layout: order of the axes of the uint8 input.
        versions: of the packages that made it.
        kept_float: layers of an int8 file that stay in floating point.
        checkpoint_sha256: of the file it was made of.
        measured: what it was measured to do.
    """

    format: Format
    outputs: Outputs
    precision: Precision = "float32"
    variant: str = ""
    info: DetectorInfo
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    kept_float: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    checkpoint_sha256: str = ""
    measured: Measured = field(default_factory=Measured)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Name of each label."""
        return self.info.class_names

    def to_json(self) -> str:
        """The record as json, with what other programs want to know at the top: size, names, normalisation."""
        model = self.info.model
        readable = {
            "input": {
                "layout": self.layout,
                "dtype": input_dtype(self.format),
                "colour": "RGB",
                "height": model.input_size[0],
                "width": model.input_size[1],
                "resize": model.resize,
                "fill": list(model.fill),
                "normalisation": "inside the file",
            },
            "names": list(self.info.class_names),
        }
        return json.dumps({**readable, "record": to_plain(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes, source: str | Path) -> ExportRecord:
        """The inverse of ``to_json``.

        Raises:
            UserError: text of another kind, or of a later version.
        """
        content = parse_record(text, source)
        if content.get("task") == CLASSIFICATION:
            raise UserError(f"{source} is an exported classifier; a detector was expected")
        record = from_plain(content["record"], cls, {DetectorConfig: config_type}, source)
        record.info.model.validate()
        return record


def is_exported(path: str | Path) -> bool:
    """Whether a file's name has the ending of an exported file."""
    return Path(path).suffix.lower() in SUFFIXES


def sha256_of_detector(path: Path) -> str:
    """The SHA-256 of a detector's file; of an exported one and of each file that belongs to it, joined by "+"."""
    return "+".join(sha256_of(one) for one in (files_of(path) if is_exported(path) else [path]))


@dataclass(kw_only=True, slots=True)
class Exported:
    """An exported file, opened.

    Attributes:
        runner: runs it.
        record: what travelled with it.
    """

    runner: Runner
    record: ExportRecord


def open_exported(path: str | Path, *, backend: str | None = None) -> Exported:
    """An exported file, ready to run on the CPU.

    Args:
        path: a file as ``litedet export`` writes it, of one of ``SUFFIXES`` with what belongs beside it.
        backend: "openvino" runs an ONNX file by OpenVINO; None: by the library that the format belongs to.

    Raises:
        FileNotFoundError: no such file.
        UserError: not an exported detector of ours, damaged, or the package that runs it is missing.
    """
    text, make = open_file(path, backend=backend)
    record = _record_of(text, Path(path))
    try:
        anchors = build_detector(record.info.model, len(record.info.class_names)).anchors
        return Exported(runner=make(anchors, record.info.model.input_size), record=record)
    except (UserError, OSError):
        raise
    except Exception as error:
        raise _cannot_be_opened(Path(path), error) from error


MakeRunner = Callable[[Tensor, tuple[int, int]], FileRunner]
"""Anchors [A, 4] ([0, 4]: no detector) and input size (height, width) -> what runs the file."""


def open_file(path: str | Path, *, backend: str | None = None) -> tuple[str | bytes | None, MakeRunner]:
    """The record in an exported file, a detector's or a classifier's, as text (None: there is none), and what runs the file.

    Args:
        path, backend: as for ``open_exported``.

    Raises:
        FileNotFoundError: no such file.
        UserError: damaged, of a format that does not run here, or the package that runs it is missing.
    """
    path = Path(path)
    kind = SUFFIXES[path.suffix.lower()]
    if kind == "coreml":
        raise UserError(f"{path}: a Core ML model runs on Apple's systems alone, and is not run here")
    path = existing_file(path, "an exported detector")
    if backend is not None and (kind, backend) not in (("onnx", "onnxruntime"), ("onnx", "openvino"), (kind, kind)):
        raise UserError(f"{path}: backend {backend} does not run a file of the format {kind}; leave it out")
    opener = _OPENERS[kind]
    try:
        text, make = opener(path)
        if kind == "onnx" and backend == "openvino":
            content = path.read_bytes()
            return text, lambda anchors, size: OpenVinoRunner(content, anchors)
        return text, make
    except ImportError as error:
        extra = EXTRAS.get(kind, "export")
        raise UserError(
            f"{path} needs the package {error.name}, which is not installed; pip install 'litedet[{extra}]'"
        ) from error
    except (UserError, OSError):
        raise
    except Exception as error:  # each library has its own for a damaged file
        raise _cannot_be_opened(path, error) from error


def _cannot_be_opened(path: Path, error: Exception) -> UserError:
    first = (str(error).strip().splitlines() or [""])[0][:300]
    return UserError(f"{path} cannot be opened: {type(error).__name__}: {first}")


_Opened = tuple[str | bytes | None, MakeRunner]


def _open_onnx(path: Path) -> _Opened:
    import onnxruntime

    content = path.read_bytes()
    quick = onnxruntime.SessionOptions()
    quick.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, quick, providers=["CPUExecutionProvider"])
    metadata: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    return metadata.get(KEY), lambda anchors, size: OnnxRuntimeRunner(content, anchors)


def _open_openvino(path: Path) -> _Opened:
    existing_file(path.with_suffix(".bin"), f"the weights of {path.name}")
    model = openvino_core().read_model(path)
    text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    return text, lambda anchors, size: OpenVinoRunner(path, anchors)


def _open_litert(path: Path) -> _Opened:
    content = path.read_bytes()
    return _archived_record(path), lambda anchors, size: LiteRTRunner(content, anchors, size)


def _open_torch(path: Path) -> _Opened:
    with zipfile.ZipFile(path) as archive:
        compiled = any("/aotinductor/" in name for name in archive.namelist())
    if compiled:
        return record_beside(path), lambda anchors, size: AotRunner(path, anchors)
    extra = {KEY: ""}
    program = torch.export.load(path, extra_files=extra)
    return extra[KEY] or None, lambda anchors, size: ProgramRunner(path, program, anchors)


def _open_executorch(path: Path) -> _Opened:
    with quiet(""):
        import executorch.runtime  # noqa: F401  asked for before the runner is made
    return _archived_record(path), lambda anchors, size: ExecuTorchRunner(path, anchors)


def _open_ncnn(path: Path) -> _Opened:
    import ncnn  # noqa: F401  asked for before the runner is made

    existing_file(path.with_suffix(".bin"), f"the weights of {path.name}")
    return record_beside(path), lambda anchors, size: NcnnRunner(path, anchors)


_OPENERS: dict[Format, Callable[[Path], _Opened]] = {
    "onnx": _open_onnx,
    "openvino": _open_openvino,
    "litert": _open_litert,
    "torch": _open_torch,
    "executorch": _open_executorch,
    "ncnn": _open_ncnn,
}


def _archived_record(path: Path) -> bytes | None:
    with contextlib.suppress(zipfile.BadZipFile, KeyError), zipfile.ZipFile(path) as archive:
        return archive.read(RECORD_NAME)
    return None


def beside(path: Path) -> Path:
    """Where the record of a file lies that has no room for it: ``detector.param.json`` for ``detector.param``."""
    return path.with_name(f"{path.name}.json")


def files_of(path: Path) -> list[Path]:
    """An exported file with what belongs beside it, that which names the others last."""
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    more = [path.with_suffix(".bin")] if path.suffix.lower() in (".xml", ".param") else []
    return [*(file for file in (*more, beside(path)) if file.exists()), path]


def record_beside(path: Path) -> bytes | None:
    """The record beside a file; None where there is none."""
    return beside(path).read_bytes() if beside(path).is_file() else None


def _record_of(text: str | bytes | None, path: Path) -> ExportRecord:
    if text is None:
        raise UserError(
            f"{path} has no record of LiteDet inside, so nothing says how images go in and what comes out; "
            "files of litedet export have one"
        )
    return ExportRecord.from_json(text, path)


class FilePostprocess:
    """Post-processing of a file that finishes its detections itself: a threshold, and boxes in pixels of the image.

    Args:
        score_threshold: detections at or below it are dropped.
        class_names: handed on to the detections.
    """

    def __init__(self, score_threshold: float, class_names: tuple[str, ...]) -> None:
        self.score_threshold = score_threshold
        self.class_names = class_names

    def __call__(self, raw: RawPredictions, placements: Tensor, original_sizes: Tensor) -> list[Detections]:
        """The detections of each image.

        Args:
            raw: of ``as_predictions``: boxes [B, K, 4] as codes, (score, label) [B, K, 2] as class logits.
            placements: float32 [B, 4], see ``Placement``.
            original_sizes: int64 [B, 2], (height, width).

        Returns:
            B detections, best first, boxes in pixels of the image and inside it.
        """
        found = []
        limits = original_sizes.float().flip(-1)
        for boxes, rows, placement, limit in zip(raw.codes, raw.class_logits, placements.float(), limits, strict=True):
            boxes = to_image(boxes, placement).unflatten(-1, (2, 2)).clamp(min=0).minimum(limit).flatten(-2)
            keep = (rows[:, 0] > self.score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(-1)
            order = rows[keep, 0].argsort(descending=True, stable=True)
            found.append(
                Detections(
                    boxes=boxes[keep][order],
                    scores=rows[keep, 0][order],
                    labels=rows[keep, 1][order].long(),
                    class_names=self.class_names,
                )
            )
        return found


class LiteRTRunner(FileRunner):
    """A ``.tflite`` file of a detector, run by LiteRT's interpreter on the CPU, image by image.

    Args:
        content: the file.
        anchors: float32 [A, 4], the detector's.
        input_size: (height, width).
        num_threads: threads for one call; None: as many as torch has at this moment.

    Raises:
        ImportError: the package ai-edge-litert is not installed.
    """

    max_batch = 1

    def __init__(
        self, content: bytes, anchors: Tensor, input_size: tuple[int, int], num_threads: int | None = None
    ) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self.content = content
        self.anchors = anchors
        self.input_size = input_size
        self._make = lambda: Interpreter(model_content=content, num_threads=num_threads or torch.get_num_threads())
        # An interpreter serves one caller at a time.
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free.put(self._ready())

    def _ready(self) -> Any:
        interpreter = self._make()
        interpreter.allocate_tensors()
        return interpreter

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        try:
            interpreter = self._free.get_nowait()
        except queue.Empty:
            interpreter = self._ready()
        try:
            # The file's input is [1, H, W, 3]: a batch that lies channels-last is that already.
            pixels = np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())
            interpreter.set_tensor(interpreter.get_input_details()[0]["index"], pixels)
            interpreter.invoke()
            outputs = [interpreter.get_tensor(one["index"]) for one in interpreter.get_output_details()]
        finally:
            self._free.put(interpreter)
        return [_rows(outputs, self.input_size)] if len(outputs) == 4 else outputs  # 4: TFLite_Detection_PostProcess

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.content, self.anchors, self.input_size)


def _rows(outputs: list[NDArray[Any]], input_size: tuple[int, int]) -> NDArray[np.float32]:
    """Boxes (y1 x1 y2 x2 in 0..1), classes, scores and their number -> [1, K, 6]: xyxy in pixels, score, label."""
    boxes, classes, scores, count = outputs
    height, width = input_size
    rows = np.zeros((1, boxes.shape[1], 6), np.float32)
    used = int(count[0])
    rows[0, :used, :4] = boxes[0, :used][:, [1, 0, 3, 2]] * np.array([width, height, width, height], np.float32)
    rows[0, :used, 4] = scores[0, :used]
    rows[0, :used, 5] = classes[0, :used]
    return rows


class ProgramRunner(FileRunner):
    """A torch.export archive of a network on the CPU.

    Args:
        path: of the archive.
        program: the archive, loaded.
        anchors: float32 [A, 4], the detector's.
    """

    own_threads = False

    def __init__(self, path: Path, program: torch.export.ExportedProgram, anchors: Tensor) -> None:
        self.path = path
        self.anchors = anchors
        self._module = program.module()

    def outputs(self, images: Tensor) -> list[NDArray[np.float32]]:
        """See ``FileRunner``."""
        # An archive is traced for one layout; another one may be misread without a word.
        return [output.detach().numpy() for output in self._module(images.contiguous())]

    def __reduce__(self) -> tuple[Any, ...]:
        return _program_runner, (self.path, self.anchors)


def _program_runner(path: Path, anchors: Tensor) -> ProgramRunner:
    return ProgramRunner(path, torch.export.load(path), anchors)
