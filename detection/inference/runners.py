"""What runs a detector's network when it predicts: torch, torch.compile, ONNX Runtime or OpenVINO.

All of them take the same images and say the same to 1e-4; post-processing is ours with each. ONNX Runtime and OpenVINO
are extra packages (``pip install litedet[export]``) and are imported when they are asked for.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.layers import ConvNormAct
from detection.models.detector import Detector
from detection.structures import RawPredictions

Backend = Literal["torch", "compile", "onnxruntime", "openvino"]
Network = Callable[[Tensor], RawPredictions]
"""uint8 [B, 3, H, W], RGB -> raw predictions, on the device of the images."""


def build_network(model: Detector, backend: Backend, device: torch.device) -> Network:
    """What computes a detector's raw predictions.

    Args:
        model: in evaluation mode, on ``device``; best with its batch norms folded.
        backend: "torch" runs it as it is, on an x86 processor with its convolutions packed. "compile" compiles it at the
            first call, which takes a minute or so. "onnxruntime" and "openvino" run on CPUs, with as many threads as torch
            has at this moment.
        device: where the images will be.

    Raises:
        UserError: a package that is not installed, a backend that does not run on the device.
    """
    if backend == "torch":
        return _packed(model) if device.type == "cpu" and _can_pack() else model
    if backend == "compile":
        compiled: Network = torch.compile(model)
        return compiled
    if device.type != "cpu":
        raise UserError(f"backend {backend} runs on the CPU here, the device is {device}; take 'torch' or 'compile'")
    make = {"onnxruntime": _onnxruntime, "openvino": _openvino}[backend]
    try:
        run = make(to_onnx(model), torch.get_num_threads())
    except ImportError as error:
        raise UserError(
            f"backend {backend} needs the package {error.name}, which is not installed; pip install 'litedet[export]'"
        ) from error
    anchors = model.anchors

    def predict(images: Tensor) -> RawPredictions:
        return RawPredictions(*run(images), anchors)

    return predict


def _can_pack() -> bool:
    """oneDNN's packed convolutions are there, on a processor where they are known to be quicker."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


def _packed(model: Detector) -> Detector:
    """A copy of a detector whose weights lie as oneDNN wants them, with ReLU6 computed inside the convolutions.

    A plain convolution lays its weights out anew at every call, which is a sixth of the network's time for one image. The
    detector itself stays as it is; what is loaded into it later does not reach the copy.
    """
    packed = copy.deepcopy(model)
    shapes: dict[nn.Conv2d, list[int]] = {}
    convolutions = [layer for layer in packed.modules() if isinstance(layer, nn.Conv2d)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs: shapes.update({layer: list(inputs[0].shape)}))
        for layer in convolutions
    ]
    with torch.inference_mode():
        packed(torch.zeros(1, 3, *model.config.input_size, dtype=torch.uint8))
    for hook in hooks:
        hook.remove()
    for parent in list(packed.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Conv2d):
                fuse = isinstance(parent, ConvNormAct) and isinstance(parent.norm, nn.Identity)
                relu6 = fuse and isinstance(parent.act, nn.ReLU6)
                setattr(parent, name, _PackedConv(layer, shapes[layer], relu6))
                if relu6:
                    parent.act = nn.Identity()
    return packed


class _PackedConv(nn.Module):
    """A convolution for prediction, with ReLU6 behind it or not; quickest for inputs of ``shape``, right for all."""

    def __init__(self, conv: nn.Conv2d, shape: list[int], relu6: bool) -> None:
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        # The operators that torch.compile puts in a convolution's place.
        self.weight = torch.ops.mkldnn._reorder_convolution_weight(conv.weight.detach(), *self.geometry, shape)
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.activation = ("hardtanh", [0.0, 6.0], "") if relu6 else ("none", [], "")

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, *self.activation
        )
        return result


@contextlib.contextmanager
def threads_for(backend: Backend) -> Iterator[None]:
    """How many threads torch has in a prediction: one where another library's threads run the network.

    torch's threads keep a core busy for milliseconds after an operator, in case another one follows, and the backend's own
    threads wait: with two cores a prediction of 16 ms took 19.
    """
    if backend in ("torch", "compile"):
        yield
        return
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def to_onnx(model: Detector) -> bytes:
    """The network as an ONNX file: what ``Detector.forward`` computes, the normalisation included.

    Input ``images``: uint8 [B, 3, H, W], RGB, H and W those of the config. Outputs ``codes`` [B, A, D] and
    ``class_logits`` [B, A, C], float32. B is free.

    Raises:
        ImportError: torch's exporter needs the packages onnx and onnxscript.
    """
    images = torch.zeros(2, 3, *model.config.input_size, dtype=torch.uint8, device=model.anchors.device)
    # The exporter reports its steps on stdout and in the log, whatever it is told.
    exporter_log = logging.getLogger("torch.onnx")
    level = exporter_log.level
    exporter_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _WithoutAnchors(model),
                (images,),
                input_names=["images"],
                output_names=["codes", "class_logits"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    finally:
        exporter_log.setLevel(level)
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


class _WithoutAnchors(nn.Module):
    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        raw = self.model(images)
        return raw.codes, raw.class_logits


def _onnxruntime(onnx: bytes, num_threads: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    # Otherwise its threads keep the cores busy for a while after each image, and post-processing goes at half the speed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        boxes, classes = session.run(None, {"images": np.ascontiguousarray(images.numpy())})
        return torch.from_numpy(boxes), torch.from_numpy(classes)

    return run


def _openvino(onnx: bytes, num_threads: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    import openvino

    core = openvino.Core()
    # Its default on processors with bfloat16 units would be that format.
    settings = {"INFERENCE_NUM_THREADS": num_threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(onnx), "CPU", settings)
    request = compiled.create_infer_request()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        # The request writes every answer to the same memory, hence the copies.
        results = request.infer({0: np.ascontiguousarray(images.numpy())}, share_inputs=True)
        return torch.from_numpy(results[0].copy()), torch.from_numpy(results[1].copy())

    return run
