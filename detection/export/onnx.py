"""ONNX: a free batch of uint8 images, normalisation, decoding and suppression inside; int8 as QDQ.

The eight bits end at the raw heads: a file is quantised first, and the tail that decodes and suppresses is joined to it
afterwards, in floating point.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.state import write_whole
from detection.engine.quiet import quiet
from detection.export.module import Network, Tail
from detection.export.options import ExportOptions, Record, Variant
from detection.export.sensitivity import layers_of
from detection.inference.exported import KEY
from detection.inference.runners import EXPORTER_LOGS, module_to_onnx
from detection.models.detector import Detector
from detection.postprocess import PostprocessConfig

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TAIL = "tail_"
"""What the names of the tail's nodes begin with."""

_CORRECTED = "NNCF, bias correction, per channel, reduced range"
# ONNX Runtime's own quantiser, always with reduce_range: without it pairs of products overflow 16 bits on processors with AVX2
# and no VNNI, where AP falls to a third, and a measurement on another processor does not show it.
_INT8: dict[str, dict[str, Any]] = {
    "min-max, per channel, reduced range": {},
    "min-max, per channel, reduced range, output layers float": {"outputs_float": True},
    _CORRECTED: {},  # the most exact, and up to three times as slow: it leaves what goes into sums in floating point
    "percentile 99.999, per channel, reduced range": {"percentile": 99.999},
    "min-max, per tensor, reduced range": {"per_channel": False},
}


class OnnxFile:
    """An ONNX model in memory.

    Args:
        content: of the file, without a record.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        import onnx

        model = onnx.load_from_string(self.content)
        onnx.helper.set_model_props(model, {KEY: record.to_json(), "names": "\n".join(record.class_names)})
        write_whole(path, model.SerializeToString())


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
    """
    raw, tail = network_onnx(network), tail_of(network, options)
    if network.learnt:
        yield Variant(name=LEARNT, make=lambda: OnnxFile(raw if tail is None else joined(raw, tail)))
        return
    if not options.int8:
        yield Variant(name="", make=lambda: OnnxFile(raw if tail is None else joined(raw, tail)))
        return
    assert options.calibration is not None
    prepared = _prepared(raw)
    excluded = nodes_of(prepared, network, options.keep_float)
    corrected = partial(_corrected, raw, tail, options.calibration, nodes_of(raw, network, options.keep_float))
    for name, settings in _INT8.items():
        if name != _CORRECTED:
            make = partial(_quantised, prepared, tail, options.calibration, excluded=excluded, **settings)
            yield Variant(name=name, make=make)
        elif importlib.util.find_spec("nncf") is not None:
            yield Variant(name=name, make=corrected)


LEARNT = "ranges of the training"
"""Name of the one variant of a network that was fine-tuned in eight bits."""


def network_onnx(network: Network) -> bytes:
    """A network as an ONNX model, without its tail.

    Raises:
        ImportError: a package is missing.
    """
    return module_to_onnx(network.module, network.input_size, network.outputs)


def tail_of(network: Network, options: ExportOptions) -> bytes | None:
    """The tail that a file is to have behind the raw heads, see ``tail_onnx``; None where it is to have none."""
    if options.raw or network.detector is None:
        return None
    return tail_onnx(network.detector, options.postprocess)


def nodes_of(content: bytes, network: Network, layers: tuple[str, ...]) -> list[str]:
    """Names of the convolutions (and linear layers) of an ONNX model that are these layers of the network.

    Both list them in the order of the computation.

    Args:
        content: of ``network_onnx``, optimised or not.
        network: what it was made of.
        layers: names of modules, as ``detection.export.sensitivity.layers_of`` gives them.
    """
    import onnx

    if not layers:
        return []
    order = list(layers_of(network))
    nodes = [node for node in onnx.load_from_string(content).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(nodes) == len(order), f"{len(nodes)} layers in the ONNX graph, {len(order)} in torch"
    return [nodes[order.index(layer)].name for layer in layers]


def tail_onnx(model: Detector, postprocess: PostprocessConfig) -> bytes:
    """Decoding and suppression as an ONNX model of their own: ``codes``, ``class_logits`` -> ``detections``.

    Raises:
        ImportError: a package is missing.
    """
    from onnxscript import opset20 as op

    def nms(boxes: Any, scores: Any, per_class: int, iou: float, threshold: float) -> Any:
        limits: list[Any] = [
            op.Constant(value_ints=[per_class]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[threshold]),
        ]
        return op.NonMaxSuppression(boxes, scores, *limits)

    tail = Tail(model, postprocess)
    with torch.no_grad():
        raw = model(torch.zeros(2, 3, *model.config.input_size, dtype=torch.uint8))
    batch = torch.export.Dim("batch")
    with quiet(*EXPORTER_LOGS):
        program = torch.onnx.export(
            tail,
            (raw.codes, raw.class_logits),
            input_names=["codes", "class_logits"],
            output_names=["detections"],
            dynamic_shapes=({0: batch}, {0: batch}),
            custom_translation_table={torch.ops.litedet.nms.default: nms},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def joined(raw: bytes, tail: bytes) -> bytes:
    """A network that ends in raw heads, and the tail behind it, as one model."""
    import onnx

    first, second = onnx.load_from_string(raw), onnx.load_from_string(tail)
    second = onnx.compose.add_prefix(second, TAIL, rename_outputs=False)
    opset = max(one.version for one in first.opset_import if one.domain in ("", "ai.onnx"))
    versions = {one.version for one in second.opset_import if one.domain in ("", "ai.onnx")}
    if versions != {opset}:
        second = onnx.version_converter.convert_version(second, opset)
    second.ir_version = first.ir_version
    io_map = [("codes", f"{TAIL}codes"), ("class_logits", f"{TAIL}class_logits")]
    model = onnx.compose.merge_models(first, second, io_map=io_map)
    content: bytes = model.SerializeToString()
    return content


def _prepared(raw: bytes) -> bytes:
    """The model with shapes inferred and constants folded, as the quantiser wants it."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, quiet(""):
        source, target = Path(folder, "raw.onnx"), Path(folder, "prepared.onnx")
        source.write_bytes(raw)
        quant_pre_process(str(source), str(target), skip_symbolic_shape=True)
        return target.read_bytes()


def output_layers(content: bytes) -> list[str]:
    """Names of the convolutions that the heads' outputs come from, no other convolution between."""
    import onnx

    graph = onnx.load_from_string(content).graph
    made_by = {output: node for node in graph.node for output in node.output}
    found, waiting, seen = [], [output.name for output in graph.output], set[str]()
    while waiting:
        node = made_by.get(waiting.pop())
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if node.op_type == "Conv":
            found.append(node.name)
        else:
            waiting += node.input
    return sorted(found)


def _quantised(
    prepared: bytes,
    tail: bytes | None,
    calibration: NDArray[np.uint8],
    *,
    excluded: Sequence[str] = (),
    outputs_float: bool = False,
    per_channel: bool = True,
    percentile: float | None = None,
) -> OnnxFile:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    method = CalibrationMethod.MinMax if percentile is None else CalibrationMethod.Percentile
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        source, target = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(prepared)
        quantize_static(
            str(source),
            str(target),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=[*excluded, *(output_layers(prepared) if outputs_float else ())],
            calibrate_method=method,
            extra_options={} if percentile is None else {"CalibPercentile": percentile},
        )
        content = target.read_bytes()
    return OnnxFile(content if tail is None else joined(content, tail))


def quiet_nncf() -> Any:
    """The package NNCF, which from then on reports errors alone.

    Raises:
        ImportError: it is not installed.
    """
    with quiet("torch.utils.cpp_extension"):  # it imports that, and so one learns that there is no CUDA
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf


def _corrected(
    raw: bytes, tail: bytes | None, calibration: NDArray[np.uint8], excluded: Sequence[str] = ()
) -> OnnxFile:
    """In 8 bits by NNCF, which then sets the layers' biases so that their mean outputs stay what they were."""
    import onnx

    nncf = quiet_nncf()
    data = [{"images": calibration[place : place + 1]} for place in range(len(calibration))]
    with quiet():
        model = nncf.quantize(
            onnx.load_from_string(raw),
            nncf.Dataset(data),
            preset=nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(data),
            ignored_scope=nncf.IgnoredScope(names=list(excluded)) if excluded else None,
            # Weights in seven bits: what reduce_range is to ONNX Runtime's quantiser.
            advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix.ENABLE),
        )
    content: bytes = model.SerializeToString()
    return OnnxFile(content if tail is None else joined(content, tail))


class _Reader:
    """What ONNX Runtime's quantiser draws its images from, one at a time."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self.images = images
        self.rewind()

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        return next(self._left, None)

    def rewind(self) -> None:
        self._left = iter({"images": self.images[place : place + 1]} for place in range(len(self.images)))

    def __len__(self) -> int:
        return len(self.images)
