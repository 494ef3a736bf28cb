"""ONNX: a free batch of uint8 images, normalisation, decoding and suppression inside; int8 as QDQ.

The eight bits end at the raw heads: a file is quantised first, and the tail that decodes and suppresses is joined to it
afterwards, in floating point.
"""

from __future__ import annotations

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
from detection.export.weights import in_eight_bits, mean_loss
from detection.inference.exported import KEY
from detection.inference.runners import EXPORTER_LOGS, module_to_onnx
from detection.models.detector import Detector
from detection.postprocess import PostprocessConfig

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TAIL = "tail_"
"""What the names of the tail's nodes begin with."""

# ONNX Runtime's own quantiser, with weights that overflow on no processor (detection.export.weights): what is measured on one
# holds on another. All convolve in integers from the first layer to the heads, so that none is much slower than the quickest,
# and with portable sums a browser's WebAssembly gives the same numbers. What NNCF makes leaves half of the convolutions in
# floating point: it took longer than float32, and rounded otherwise in a browser.
_INT8: dict[str, dict[str, Any]] = {
    "min-max, per channel": {},
    "min-max, per channel, output layers float": {"outputs_float": True},
    "percentile 99.999, per channel": {"percentile": 99.999},
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


# Of a percentile the quantiser keeps every number of every layer until it has seen all images: 130 MB for one of 300 pixels.
_AT_MOST = 32


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
    """
    raw, tail = network_onnx(network), tail_of(network, options)
    if network.learnt:
        heads = with_portable_sums(raw) if options.portable else raw
        yield Variant(name=LEARNT, make=lambda: OnnxFile(heads if tail is None else joined(heads, tail)))
        return
    if not options.int8:
        yield Variant(name="", make=lambda: OnnxFile(raw if tail is None else joined(raw, tail)))
        return
    assert options.calibration is not None
    prepared = _prepared(raw)
    excluded = nodes_of(prepared, network, options.keep_float)
    for name, settings in _INT8.items():
        settings = {**settings, "excluded": excluded, "portable": options.portable}
        make = partial(_quantised, prepared, tail, options.calibration, **settings)
        yield Variant(name=name, make=make)


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
    portable: bool = False,
) -> OnnxFile:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    method = CalibrationMethod.MinMax if percentile is None else CalibrationMethod.Percentile
    extra: dict[str, Any] = {}
    if percentile is not None:
        extra["CalibPercentile"] = percentile
        calibration = calibration[:_AT_MOST]
    kept = [*excluded, *(output_layers(prepared) if outputs_float else ())]
    if per_channel:
        prepared, extra["TensorQuantOverrides"] = _with_rounded_weights(prepared, kept, calibration)
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        source, target = Path(folder, "prepared.onnx"), Path(folder, "int8.onnx")
        source.write_bytes(prepared)
        quantize_static(
            str(source),
            str(target),
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            per_channel=per_channel,
            reduce_range=True,  # of what the scales do not name: linear layers, and all weights per tensor
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            calibrate_method=method,
            extra_options=extra,
        )
        content = target.read_bytes()
    if portable:
        content = with_portable_sums(content)
    return OnnxFile(content if tail is None else joined(content, tail))


def with_portable_sums(content: bytes) -> bytes:
    """Sums of eight-bit tensors computed in float32, each step as IEEE 754 says.

    ONNX Runtime joins such an Add with the conversions around it to one operator, which scales, adds and rounds in another
    order on each kind of processor and in WebAssembly: now and then it ends on the other side of a half, and all behind
    it with it. It does not join the operator Sum. That costs a twentieth of the time.
    """
    import onnx

    model = onnx.load_from_string(content)
    widened = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    for node in model.graph.node:
        if node.op_type == "Add" and widened.issuperset(node.input):
            node.op_type = "Sum"
    changed: bytes = model.SerializeToString()
    return changed


def _with_rounded_weights(
    prepared: bytes, kept: Sequence[str], calibration: NDArray[np.uint8]
) -> tuple[bytes, dict[str, list[dict[str, Any]]]]:
    """Rounds the weights of the convolutions but those of ``kept``, and corrects the biases; see ``detection.export.weights``.

    Returns:
        The model with the rounded weights, and the scales of their channels as ONNX Runtime's quantiser takes them.
    """
    import onnx
    from onnxruntime.quantization import QuantType

    model = onnx.load_from_string(prepared)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv" and node.name not in kept]
    means = _means(prepared, [node.input[0] for node in convolutions], calibration)
    found: dict[str, list[dict[str, Any]]] = {}
    for node in convolutions:
        name = node.input[1]
        if name in found:  # two layers share it
            continue
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        weights = onnx.numpy_helper.to_array(tensors[name])
        rounded = in_eight_bits(weights, groups)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(rounded.weights, name))
        found[name] = [{"scale": scale, "zero_point": 0, "quant_type": QuantType.QInt8} for scale in rounded.scales]
        found[name][0]["axis"] = 0
        if len(node.input) > 2:
            bias = onnx.numpy_helper.to_array(tensors[node.input[2]])
            bias = bias + mean_loss(weights, rounded.weights, means[node.input[0]])
            tensors[node.input[2]].CopyFrom(onnx.numpy_helper.from_array(bias, node.input[2]))
    return model.SerializeToString(), found


def _means(content: bytes, names: Sequence[str], calibration: NDArray[np.uint8]) -> dict[str, NDArray[np.float32]]:
    """Means of a model's tensors [B, C, H, W] over images, by name: float32 [C] each."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(content)
    names = list(dict.fromkeys(names))
    del model.graph.output[:]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    sums = [np.float32(0)] * len(names)
    for place in range(len(calibration)):
        values = session.run(names, {"images": calibration[place : place + 1]})
        sums = [total + value.mean((0, 2, 3)) for total, value in zip(sums, values, strict=True)]
    return {name: total / len(calibration) for name, total in zip(names, sums, strict=True)}


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
