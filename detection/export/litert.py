"""LiteRT (``.tflite``): uint8 NHWC in; TFLite_Detection_PostProcess, labels and metadata inside, or raw heads out.

The operator that decodes and suppresses is appended to the finished flatbuffer, after quantisation: the quantiser would give
its outputs ranges, and the counts would be wrong without a word. It decodes codes as SSD writes them; the boxes of any other
coder are decoded in the graph, in floating point, and written as SSD codes of one anchor that is the whole image.

The order of the outputs, boxes, classes, scores, count, is what video recorders and the Task library expect.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.state import write_whole
from detection.boxes import xyxy_to_cxcywh
from detection.engine.quiet import quiet
from detection.export.litert_metadata import BUFFER_NAME, associated_files, metadata
from detection.export.module import Network, Scores
from detection.export.options import ExportOptions, Record, Variant
from detection.export.sensitivity import layers_of
from detection.inference.exported import ExportRecord
from detection.models.box_coders import SSDBoxCoder
from detection.models.detector import Detector
from detection.postprocess import PostprocessConfig

PACKAGES = ("litert-torch", "ai-edge-litert", "ai-edge-quantizer")
_OPERATOR = "TFLite_Detection_PostProcess"
_OUTPUTS = ("detection_boxes", "detection_classes", "detection_scores", "num_detections")
# Layers are known to the quantiser by the modules they come from, the last ones by the names of the outputs.
_TAIL_SCOPE = "_Tail_|_tail|serving_default_output"
_INT8: dict[str, dict[str, Any]] = {
    "min-max, per channel, scores and boxes float": {},
    "min-max, everything in 8 bits": {"tail_float": False},
}


class OperatorTail(nn.Module):
    """Raw heads -> what the operator takes.

    Args:
        model: gives the coder, the anchors and the kind of score.

    Attributes:
        scales: y, x, h, w: what the operator divides the numbers of a code by.
        priors: float32 [A, 4], the operator's anchors: centre y, x, height, width in units of the image.
    """

    anchors: Tensor

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.coder = model.config.box_coder()
        self.score = Scores(model)
        self.register_buffer("anchors", model.anchors.detach().cpu().clone())
        self.height, self.width = model.config.input_size
        if isinstance(self.coder, SSDBoxCoder):
            centre, size = self.coder.centre_weight, self.coder.size_weight
            self.scales = (centre, centre, size, size)
            x, y, w, h = xyxy_to_cxcywh(self.anchors.double()).unbind(-1)
            unit = (y / self.height, x / self.width, h / self.height, w / self.width)
            self.priors = torch.stack(unit, -1).float().numpy()
        else:
            self.scales = (1.0, 1.0, 1.0, 1.0)
            self.priors = np.tile(np.array([0, 0, 1, 1], np.float32), (len(self.anchors), 1))

    def forward(self, codes: Tensor, class_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Codes [B, A, D], class logits [B, A, C] -> codes in the operator's order (y, x, h, w) [B, A, 4], scores [B, A, K]."""
        if isinstance(self.coder, SSDBoxCoder):
            x, y, w, h = (one[..., None] for one in codes.unbind(-1))
            return torch.cat((y, x, h, w), -1), self.score(class_logits)
        x1, y1, x2, y2 = (one[..., None] for one in self.coder.decode(codes, self.anchors).unbind(-1))
        h, w = ((y2 - y1) / self.height).clamp(min=1e-6), ((x2 - x1) / self.width).clamp(min=1e-6)
        centre_y, centre_x = (y1 + y2) / (2 * self.height), (x1 + x2) / (2 * self.width)
        return torch.cat((centre_y, centre_x, h.log(), w.log()), -1), self.score(class_logits)


class _Network(nn.Module):
    """uint8 [1, 3, H, W] -> the outputs of a network, or its heads as the operator takes them."""

    def __init__(self, heads: nn.Module, tail: OperatorTail | None) -> None:
        super().__init__()
        self.heads = heads
        self.tail = tail

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.heads(images)
        found: tuple[Tensor, ...] = outputs if self.tail is None else self.tail(*outputs)
        return found


class LiteRTFile:
    """A LiteRT model in memory.

    Args:
        content: the flatbuffer.
        finished: it ends in the operator, so that the metadata of a detector fits.
    """

    def __init__(self, content: bytes, finished: bool) -> None:
        self.content = content
        self.finished = finished

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        content = self.content
        if self.finished:
            assert isinstance(record, ExportRecord)
            content = with_metadata(content, metadata(record))
        write_whole(path, content + associated_files(record))


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
    """
    import litert_torch  # noqa: F401  asked for before any work is done

    model = network.detector
    tail = None if options.raw or model is None else OperatorTail(model)
    content = _converted(network, tail)

    def finish(flat: bytes) -> LiteRTFile:
        if tail is not None and model is not None:
            flat = with_operator(flat, tail, model.num_classes, options.postprocess)
        return LiteRTFile(flat, finished=tail is not None)

    if not options.int8:
        yield Variant(name="", make=lambda: finish(content))
        return
    assert options.calibration is not None
    kept = scopes_of(content, network, options.keep_float)
    for name, settings in _INT8.items():
        quantised = partial(_quantised, content, options.calibration, kept, **settings)
        yield Variant(name=name, make=lambda quantised=quantised: finish(quantised()))  # type: ignore[misc]


def _converted(network: Network, tail: OperatorTail | None) -> bytes:
    """The network as a flatbuffer: input uint8 [1, H, W, 3]."""
    import litert_torch

    module = litert_torch.to_channel_last_io(_Network(network.module, tail).eval(), args=[0]).eval()
    images = torch.zeros(1, *network.input_size, 3, dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        target = Path(folder, "network.tflite")
        litert_torch.convert(module, (images,)).export(str(target))
        return target.read_bytes()


def _quantised(content: bytes, calibration: NDArray[np.uint8], kept: list[str], *, tail_float: bool = True) -> bytes:
    """The flatbuffer in 8 bits: weights per channel, activations with the ranges that the images give."""
    from ai_edge_quantizer import qtyping, quantizer, recipe

    rules = recipe.static_wi8_ai8()
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        source, target = Path(folder, "float.tflite"), Path(folder, "int8.tflite")
        source.write_bytes(content)
        worker = quantizer.Quantizer(str(source), rules)
        for scope in ([_TAIL_SCOPE] if tail_float else []) + kept:
            worker.update_quantization_recipe(
                regex=scope,
                operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
                algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE,
            )
        pixels = np.ascontiguousarray(calibration.transpose(0, 2, 3, 1))
        data = {"serving_default": [{"args_0": pixels[place : place + 1]} for place in range(len(pixels))]}
        result = worker.quantize(worker.calibrate(data, num_threads=1))
        result.export_model(str(target), overwrite=True)
        return target.read_bytes()


def scopes_of(content: bytes, network: Network, layers: tuple[str, ...]) -> list[str]:
    """Regular expressions of the operators of a flatbuffer that are these layers of the network.

    The converter's names do not tell the layers apart (they lack the modules that are not called themselves), but it keeps the
    order of the computation.

    Args:
        content: in floating point.
        network: what it was made of.
        layers: names of modules, as ``detection.export.sensitivity.layers_of`` gives them.
    """
    from ai_edge_litert import schema_py_generated as schema

    if not layers:
        return []
    model = _read(content)
    graph = model.subgraphs[0]
    kinds = schema.BuiltinOperator
    wanted = (kinds.CONV_2D, kinds.DEPTHWISE_CONV_2D, kinds.FULLY_CONNECTED)
    found = [one for one in graph.operators if model.operatorCodes[one.opcodeIndex].builtinCode in wanted]
    order = layers_of(network)
    assert len(found) == len(order), f"{len(found)} layers in the flatbuffer, {len(order)} in torch"
    scopes = {}
    for operator, (name, layer) in zip(found, order.items(), strict=True):
        shape = sorted(graph.tensors[operator.inputs[1]].shape)  # the axes lie otherwise
        assert shape == sorted(layer.weight.shape), f"{name}: {shape} in the flatbuffer"  # type: ignore[arg-type]
        output = graph.tensors[operator.outputs[0]].name
        scopes[name] = f"^{re.escape(output.decode() if isinstance(output, bytes) else output)}(;|$)"
    return [scopes[layer] for layer in layers]


def with_operator(content: bytes, tail: OperatorTail, num_classes: int, postprocess: PostprocessConfig) -> bytes:
    """The flatbuffer with TFLite_Detection_PostProcess behind its two outputs.

    Args:
        content: ends in codes [1, A, 4] and scores [1, A, K], float32.
        tail: gives the operator's anchors and scales.
        num_classes: K.
        postprocess: thresholds and the number of detections.

    Returns:
        A flatbuffer with the outputs boxes [1, N, 4] (y1, x1, y2, x2 in 0..1), classes [1, N], scores [1, N], count [1].
    """
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils
    from flatbuffers import flexbuffers

    model = _read(content)
    graph = model.subgraphs[0]

    def buffer(data: bytes | None) -> int:
        one = schema.BufferT()
        one.data = None if data is None else np.frombuffer(data, np.uint8)
        model.buffers.append(one)
        return len(model.buffers) - 1

    def tensor(name: str, shape: list[int], data: bytes | None = None) -> int:
        one = schema.TensorT()
        one.name, one.shape, one.buffer = name, np.array(shape, np.int32), buffer(data)
        one.type, one.quantization = schema.TensorType.FLOAT32, None
        graph.tensors.append(one)
        return len(graph.tensors) - 1

    def operator_code(builtin: int, custom: str | None = None) -> int:
        one = schema.OperatorCodeT()
        one.builtinCode, one.deprecatedBuiltinCode = builtin, min(builtin, 127)
        one.customCode, one.version = custom, 1 if custom else 2
        model.operatorCodes.append(one)
        return len(model.operatorCodes) - 1

    inputs = []
    for index in graph.outputs:  # in the order that the network returns them: codes, scores
        given = graph.tensors[index]
        if given.type != schema.TensorType.FLOAT32:  # a quantised end: the operator takes float
            plain = tensor("dequantised", list(given.shape))
            step = schema.OperatorT()
            step.opcodeIndex = operator_code(schema.BuiltinOperator.DEQUANTIZE)
            step.inputs, step.outputs = np.array([index], np.int32), np.array([plain], np.int32)
            step.builtinOptionsType = schema.BuiltinOptions.DequantizeOptions
            step.builtinOptions = schema.DequantizeOptionsT()
            graph.operators.append(step)
            index = plain
        inputs.append(index)
    inputs.append(tensor("anchors", list(tail.priors.shape), np.ascontiguousarray(tail.priors).tobytes()))

    count = postprocess.max_detections
    shapes = ([1, count, 4], [1, count], [1, count], [1])
    outputs = [tensor(name, shape) for name, shape in zip(_OUTPUTS, shapes, strict=True)]
    settings = flexbuffers.Builder()
    with settings.Map():
        settings.Int("max_detections", count)
        settings.Int("max_classes_per_detection", 1)
        settings.Int("detections_per_class", count)
        settings.Int("num_classes", num_classes)
        settings.Bool("use_regular_nms", True)  # class by class, as ours
        settings.Float("nms_score_threshold", postprocess.score_threshold)
        settings.Float("nms_iou_threshold", postprocess.nms_threshold)
        for side, scale in zip("yxhw", tail.scales, strict=True):
            settings.Float(f"{side}_scale", scale)
    step = schema.OperatorT()
    step.opcodeIndex = operator_code(schema.BuiltinOperator.CUSTOM, _OPERATOR)
    step.inputs, step.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    step.customOptions = np.frombuffer(bytes(settings.Finish()), np.uint8)
    graph.operators.append(step)
    graph.outputs = np.array(outputs, np.int32)
    for signature in model.signatureDefs or []:
        signature.outputs = []
        for name, index in zip(_OUTPUTS, outputs, strict=True):
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name, index
            signature.outputs.append(entry)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _read(content: bytes) -> Any:
    """The flatbuffer as objects. The quantiser writes weights behind the flatbuffer; they come to lie in it."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = flatbuffer_utils.read_model_from_bytearray(bytearray(content))
    for buffer in model.buffers:
        if isinstance(buffer.data, bytes | bytearray | memoryview):
            buffer.data = np.frombuffer(buffer.data, np.uint8)  # anything else is written byte by byte
    return model


def with_metadata(content: bytes, packed: bytes) -> bytes:
    """The flatbuffer with metadata in a buffer of its own."""
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    model = _read(content)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(packed, np.uint8)
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = BUFFER_NAME, len(model.buffers) - 1
    model.metadata = [*(model.metadata or []), entry]
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))
