"""MobileNetV2 classifiers of TensorFlow Lite (.tflite), float or quantised, read into our network.

The file is read with the ``tflite`` package (the flatbuffer's schema; no TensorFlow). Weights are dequantised; the values
between layers, which the file may quantise too, stay float here. TensorFlow Lite has folded the batch norms into the
convolutions: ``unfold_norms`` takes them out again, so that the network can be trained on.

Letters in shapes: I O channels in and out, K classes.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.state import check_state, existing_file
from backbones.weights.info import WeightsInfo
from backbones.weights.layouts import PUBLIC_WIDTHS

NORM_EPS = 1e-3  # TensorFlow's; any would do, the statistics are new

_MAX_LAYERS = 1000  # the deepest public MobileNetV2 has 80
_MAX_LABELS = 1 << 20  # bytes of a label file that are read
_MAX_LABEL_FILES = 16
_MAX_NAME = 200  # characters of a tensor's name that are told

# What the flatbuffer's accessors, which check nothing, raise for offsets and numbers that make no sense.
_DAMAGED = (IndexError, KeyError, TypeError, AttributeError, ValueError, OverflowError, ZeroDivisionError, RecursionError,
            MemoryError, struct.error)  # fmt: skip

_PASSED_BY = ("ADD", "AVERAGE_POOL_2D", "DEQUANTIZE", "MEAN", "QUANTIZE", "RESHAPE", "SOFTMAX", "SQUEEZE")


@dataclass(slots=True)
class Layer:
    """A convolution or the linear layer of the file.

    Attributes:
        name: of its weights in the file.
        weight: float32 [O, I, height, width], torch's order; a depthwise one [C, 1, height, width].
        bias: float32 [O].
        stride: step of the kernel.
        depthwise: whether each channel is filtered alone.
        activation: "relu6" or "none".
    """

    name: str
    weight: Tensor
    bias: Tensor
    stride: int
    depthwise: bool
    activation: str

    def what(self) -> str:
        kind = "depthwise" if self.depthwise else "full"
        return f"{kind} {list(self.weight.shape)}, stride {self.stride}, activation {self.activation}"


def is_tflite(path: Path) -> bool:
    """Whether a file begins as a TensorFlow Lite flatbuffer does."""
    with path.open("rb") as file:
        return file.read(8)[4:] == b"TFL3"


def read_tflite(path: Path) -> tuple[Classifier, WeightsInfo, list[str]]:
    """The classifier of a .tflite file: the same function of an image, with batch norms that do nothing yet.

    1,001 classes are ImageNet with a background class in front, which no image has as its label: it is dropped, so
    that the 1,000 classes stand in their usual order.

    Args:
        path: the file.

    Returns:
        The classifier in evaluation mode, what travels with it, and remarks on what was done.

    Raises:
        ImportError: the ``tflite`` package is not there.
        UserError: the file holds something else than a MobileNetV2 classifier; every layer that differs is named. Or it holds
            an infinity or NaN.
    """
    layers, mean, std = _read_layers(path)
    if len(layers) < 2:
        raise UserError(f"{path} has {len(layers)} convolutions; a MobileNetV2 classifier was expected")
    with torch.device("meta"):  # a file says how large its network is: it has to hold it, too, before that is built
        classifier, problems = _nearest(layers)
    if problems:
        raise UserError(
            "\n".join([f"{path} holds no MobileNetV2 classifier that is known here, nothing was read:", *problems])
        )
    classifier = Classifier(ClassifierConfig(backbone=classifier.backbone.config), classifier.num_classes)
    places = _places(classifier)
    for place, layer in zip(places, layers[:-1], strict=True):
        place.conv.weight.data.copy_(layer.weight)
        running_mean, running_var = _statistics(place)
        running_mean.zero_()
        running_var.fill_(1.0)
        place.norm.weight.data.fill_((1 + NORM_EPS) ** 0.5)
        place.norm.bias.data.copy_(layer.bias)
    weight, bias, names, remarks = (
        layers[-1].weight.flatten(1),
        layers[-1].bias,
        _class_names(path, len(layers[-1].bias)),
        [],
    )
    if len(bias) == 1001:
        weight, bias, names = weight[1:], bias[1:], names[1:]
        remarks.append("class 0 of 1001 is the background and was dropped: 1000 classes in ImageNet's usual order")
    classifier.linear.weight.data.copy_(weight)
    classifier.linear.bias.data.copy_(bias)
    check_state(classifier, classifier.state_dict(), path)  # for an infinity or NaN
    info = WeightsInfo(mean=mean, std=std, class_names=names, source=path.name, layout="tflite", padding="tf_same")
    return classifier.eval(), info, remarks


@torch.inference_mode()
def unfold_norms(classifier: Classifier, batches: Iterable[Tensor]) -> int:
    """Give the batch norms of a folded network real statistics, without a change of what the network computes.

    Every norm gets the mean m and the variance v of its convolution's output over sample images, the scale
    sqrt(v + eps) and the shift bias + m: in evaluation it still adds the folded bias alone, and in training, where the
    statistics of a batch stand in, it does nearly the same. With the statistics left at 0 and 1 the first step in
    training mode would divide every channel by its own deviation and destroy the network.

    Args:
        classifier: as ``read_tflite`` gives it.
        batches: normalised images, float [B, 3, H, W]; a few hundred images together.

    Returns:
        The number of images.

    Raises:
        UserError: there were no images.
    """
    places = _places(classifier)
    sums = [torch.zeros(2, len(place.norm.bias), dtype=torch.float64) for place in places]
    counts = [0] * len(places)

    def measure(index: int) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].double()
            sums[index] += torch.stack((x.sum((0, 2, 3)), x.square().sum((0, 2, 3))))
            counts[index] += x.numel() // x.shape[1]

        return hook

    # The network computes the same before and after, so one pass measures all layers at once.
    hooks = [place.norm.register_forward_pre_hook(measure(index)) for index, place in enumerate(places)]
    num_images = 0
    try:
        for images in batches:
            classifier.eval()(images)
            num_images += len(images)
    finally:
        for handle in hooks:
            handle.remove()
    if num_images == 0:
        raise UserError("no images to measure batch norm statistics on")
    for place, (total, squares), count in zip(places, sums, counts, strict=True):
        norm = place.norm
        running_mean, running_var = _statistics(place)
        bias = norm.bias - running_mean * norm.weight / (running_var + norm.eps).sqrt()  # of the folded layer
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        running_mean.copy_(mean)
        running_var.copy_(variance)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.bias.copy_(bias.double() + mean)
    return num_images


def _places(classifier: Classifier) -> list[ConvNormAct]:
    """The convolutions in the order of the computation."""
    return [module for module in classifier.backbone.modules() if isinstance(module, ConvNormAct)]


def _statistics(place: ConvNormAct) -> tuple[Tensor, Tensor]:
    mean, variance = place.norm.running_mean, place.norm.running_var
    assert mean is not None
    assert variance is not None
    return mean, variance


def _nearest(layers: list[Layer]) -> tuple[Classifier, list[str]]:
    """The classifier with the layers' width, and what in the layers it does not expect."""
    width = next(
        (w for w in PUBLIC_WIDTHS if _shapes(w)[:6] == [tuple(layer.weight.shape) for layer in layers[:6]]),
        1.0,
    )
    num_classes = len(layers[-1].bias)
    config = MobileNetV2Config(width=width, padding="tf_same", norm_eps=NORM_EPS)
    classifier = Classifier(ClassifierConfig(backbone=config), num_classes - (num_classes == 1001))
    expected = [
        Layer(
            name,
            place.conv.weight.detach(),
            place.norm.bias.detach(),
            place.stride,
            place.conv.groups > 1,
            "relu6" if isinstance(place.act, nn.ReLU6) else "none",
        )
        for name, place in classifier.backbone.named_modules()
        if isinstance(place, ConvNormAct)
    ]
    linear = torch.empty(num_classes, classifier.linear.in_features, 1, 1)
    expected.append(Layer("linear", linear, torch.empty(num_classes), 1, False, "none"))
    problems = [
        f"  {ours.name}: expected {ours.what()}; the file has {theirs.what()} ({theirs.name})"
        for ours, theirs in zip(expected, layers, strict=False)
        if ours.what() != theirs.what()
    ]
    problems += [f"  {ours.name}: expected {ours.what()}; missing" for ours in expected[len(layers) :]]
    problems += [f"  not expected: {theirs.what()} ({theirs.name})" for theirs in layers[len(expected) :]]
    return classifier, problems


def _shapes(width: float) -> list[tuple[int, ...]]:
    with torch.device("meta"):
        classifier = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=width)), 1)
    return [tuple(place.conv.weight.shape) for place in _places(classifier)]


def _class_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """The names in the label file that may be packed behind the flatbuffer (TensorFlow Lite's metadata), else none."""
    if not zipfile.is_zipfile(path):
        return ()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in [name for name in archive.namelist() if name.endswith(".txt")][:_MAX_LABEL_FILES]:
                with archive.open(entry) as file:
                    names = tuple(file.read(_MAX_LABELS).decode("utf-8", "replace").splitlines())
                if len(names) == num_classes:
                    return names
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
        ValueError,
        struct.error,
    ) as error:
        raise UserError(
            f"{path}: the label files packed in it are damaged ({type(error).__name__}: {error})"
        ) from error
    return ()


def _read_layers(path: Path) -> tuple[list[Layer], tuple[float, float, float], tuple[float, float, float]]:
    """The file's convolutions in their order, and the mean and std of its input."""
    try:
        import tflite
    except ImportError as error:
        raise ImportError(
            "a .tflite file is read with the package tflite, which is not installed: pip install 'litedet[convert]'"
        ) from error
    names = {number: name for name, number in vars(tflite.BuiltinOperator).items() if isinstance(number, int)}
    activations = {
        tflite.ActivationFunctionType.NONE: "none",
        tflite.ActivationFunctionType.RELU6: "relu6",
    }
    try:
        content = existing_file(path).read_bytes()
        model = tflite.Model.GetRootAs(content)
        graph = model.Subgraphs(0)
        operators = [graph.Operators(index) for index in range(graph.OperatorsLength())]
        made_by = {operator.Outputs(0): operator for operator in operators}
        codes = [model.OperatorCodes(operator.OpcodeIndex()) for operator in operators]
        kinds = [names[max(code.BuiltinCode(), code.DeprecatedBuiltinCode())] for code in codes]
        layers: list[Layer] = []
        num_values = 0
        for operator, kind in zip(operators, kinds, strict=True):
            if kind in _PASSED_BY:
                continue
            options: Any
            if kind == "CONV_2D":
                options = tflite.Conv2DOptions()
            elif kind == "DEPTHWISE_CONV_2D":
                options = tflite.DepthwiseConv2DOptions()
            elif kind == "FULLY_CONNECTED":
                options = tflite.FullyConnectedOptions()
            else:
                raise UserError(f"{path}: the operator {kind} is in no MobileNetV2 classifier")
            table = operator.BuiltinOptions()
            options.Init(table.Bytes, table.Pos)
            name, weight = _constant(model, graph, made_by, operator.Inputs(1))
            bias = _constant(model, graph, made_by, operator.Inputs(2))[1]
            num_values += weight.size + bias.size
            if len(layers) == _MAX_LAYERS or num_values > len(content):  # every value takes a byte at least
                raise UserError(
                    f"{path} is damaged: its layers have more values than the file has bytes, or are too many"
                )
            num_outputs = weight.shape[-1 if kind == "DEPTHWISE_CONV_2D" else 0]
            if bias.shape != (num_outputs,):
                raise UserError(f"{path}: {name} has {num_outputs} outputs and a bias of shape {list(bias.shape)}")
            stride = 1
            if kind == "FULLY_CONNECTED":
                weight = weight[:, None, None]
            else:
                stride = options.StrideH()
                if options.Padding() != tflite.Padding.SAME and max(weight.shape[1:3]) > 1:
                    raise UserError(f"{path}: {name} has the padding VALID; known here is SAME")
            order = (3, 0, 1, 2) if kind == "DEPTHWISE_CONV_2D" else (0, 3, 1, 2)
            activation = options.FusedActivationFunction()
            layers.append(
                Layer(
                    name,
                    torch.from_numpy(np.ascontiguousarray(weight.transpose(order))),
                    torch.from_numpy(bias),
                    stride,
                    kind == "DEPTHWISE_CONV_2D",
                    activations.get(activation, f"number {activation}"),
                )
            )
        mean, std = _normalisation(graph.Tensors(graph.Inputs(0)), tflite.TensorType.UINT8)
    except UserError:
        raise
    except _DAMAGED as error:
        raise UserError(f"{path} is a damaged TensorFlow Lite file ({type(error).__name__}: {error})") from error
    return layers, (mean, mean, mean), (std, std, std)


def _constant(model: Any, graph: Any, made_by: dict[int, Any], index: int) -> tuple[str, NDArray[np.float32]]:
    """A constant tensor's name and its values, dequantised."""
    import tflite

    types = {
        tflite.TensorType.FLOAT32: np.float32,
        tflite.TensorType.FLOAT16: np.float16,
        tflite.TensorType.INT32: np.int32,
        tflite.TensorType.UINT8: np.uint8,
        tflite.TensorType.INT8: np.int8,
    }
    tensor = graph.Tensors(index)
    data = model.Buffers(tensor.Buffer()).DataAsNumpy()
    if isinstance(data, int):  # no data of its own: float16 files hold the constant before a DEQUANTIZE operator
        return _constant(model, graph, made_by, made_by[index].Inputs(0))
    if tensor.ShapeLength() > 4:  # of a convolution's weights; a damaged file may claim very many
        raise ValueError(f"the tensor {index} has {tensor.ShapeLength()} dimensions")
    shape = [tensor.Shape(axis) for axis in range(tensor.ShapeLength())]
    if min(shape, default=0) < 0:
        raise ValueError(f"the tensor {index} claims the shape {shape}")
    name = tensor.Name().decode()[:_MAX_NAME]
    values = np.frombuffer(data.tobytes(), types[tensor.Type()]).reshape(shape)
    quantization = tensor.Quantization()
    if quantization is not None and quantization.ScaleLength():
        scale = quantization.ScaleAsNumpy().astype(np.float64)
        zero = quantization.ZeroPointAsNumpy().astype(np.float64) if quantization.ZeroPointLength() else np.zeros(1)
        if len(scale) > 1:  # one a channel, along one axis
            along = [1] * values.ndim
            along[quantization.QuantizedDimension()] = -1
            scale, zero = scale.reshape(along), zero.reshape(along)
        if np.broadcast_shapes(values.shape, scale.shape, zero.shape) != values.shape:  # else a few bytes become many
            raise ValueError(f"the tensor {index} of shape {shape} has {scale.size} scales and {zero.size} zero points")
        return name, ((values - zero) * scale).astype(np.float32)
    return name, values.astype(np.float32)


def _normalisation(tensor: Any, uint8: int) -> tuple[float, float]:
    """Mean and std of the input in units of pixel / 255: [-1, 1], unless the file's own 8-bit input says otherwise."""
    quantization = tensor.Quantization()
    if tensor.Type() == uint8 and quantization is not None and quantization.ScaleLength():
        scale = quantization.Scale(0)
        if not 0 < scale < math.inf:
            raise ValueError(f"its input has the scale {scale}")
        mean, std = quantization.ZeroPoint(0) / 255, 1 / (255 * scale)
        if max(abs(mean - 0.5), abs(std - 0.5)) > 0.01:  # the 8-bit form of [-1, 1] is off by up to one step
            return float(mean), float(std)
    return 0.5, 0.5
