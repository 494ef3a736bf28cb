"""A detector on an x86 processor, computed by oneDNN's packed convolutions.

Letters in shapes: B batch, C channels, H W height and width of a map.
"""

import copy
import threading
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from backbones.layers import ConvNormAct
from backbones.mobilenetv2 import InvertedResidual, MobileNetV2
from detection.models.detector import Detector
from detection.models.necks import DepthwiseSeparable
from detection.structures import RawPredictions

# Tracing takes a quarter of a second: not for a command that looks at one image, nor for every number of images.
_CALLS_BEFORE_TRACING = 2
_MOST_TRACES = 4
_ONE_AT_A_TIME = threading.Lock()  # torch.fx replaces methods of nn.Module while it traces


class PackedRunner:
    """A detector, its weights laid out as oneDNN wants them, with sums and ReLU6 computed inside the convolutions.

    A plain convolution lays its weights out anew at every call, which is a sixth of the network's time for one image; sums and
    the normalisation of the input are passes over whole maps, another twentieth. From the third call for a number of images on,
    its operators are called one after another and no modules, which is a twelfth of the time for one image.

    Args:
        model: in evaluation mode on the CPU. What is loaded into it later does not reach the runner. Sums are computed inside
            of convolutions whose batch norm is folded (``fold_norms``).
    """

    device = torch.device("cpu")

    def __init__(self, model: Detector) -> None:
        self.model = model
        self._packed = _packed(model)
        self._calls: Counter[_Kind] = Counter()
        self._traces: dict[_Kind, _Trace] = {}

    def __call__(self, images: Tensor) -> RawPredictions:
        """See ``Runner``."""
        kind = (images.shape, images.dtype)
        if kind not in self._traces:
            if self._calls[kind] < _CALLS_BEFORE_TRACING or len(self._traces) >= _MOST_TRACES:
                self._calls[kind] += 1
                raw: RawPredictions = self._packed(images)
                return raw
            with _ONE_AT_A_TIME:
                if kind not in self._traces:  # another thread's, meanwhile
                    self._traces[kind] = _traced(self._packed, images)
        codes, class_logits = self._traces[kind](images.contiguous(memory_format=torch.channels_last))
        return RawPredictions(codes, class_logits, self._packed.anchors)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model,)  # oneDNN's layouts are not for files


def can_pack() -> bool:
    """oneDNN's packed convolutions are there, on a processor where they are known to be quicker."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability().startswith("AVX")
        and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight")
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
    )


_Kind = tuple[torch.Size, torch.dtype]
_Trace = Callable[[Tensor], tuple[Tensor, Tensor]]


def _traced(network: Detector, images: Tensor) -> _Trace:
    """A function that calls the operators of a network one after another, for images of this shape and dtype, channels-last."""

    def codes_and_logits(images: Tensor) -> tuple[Tensor, Tensor]:
        raw: RawPredictions = network(images)
        return raw.codes, raw.class_logits

    with torch.inference_mode(False), torch.no_grad():
        like = torch.zeros(images.shape, dtype=images.dtype).contiguous(memory_format=torch.channels_last)
        graph = make_fx(codes_and_logits)(like)
    # Not the module itself, which looks for each of its tensors in three dictionaries.
    constants = SimpleNamespace(**dict(graph.named_buffers()), **dict(graph.named_parameters()))
    forward = type(graph).forward
    return lambda images: forward(constants, images)


def _packed(model: Detector) -> Detector:
    """A copy of a detector with packed convolutions."""
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
    backbone = getattr(packed, "backbone", None)
    if isinstance(backbone, MobileNetV2):
        stem = backbone.stem.conv
        stem.weight = nn.Parameter(stem.weight / packed.normalise.std)
        packed.normalise = _Centred(packed.normalise.mean, model.config.input_size[1])  # type: ignore[assignment]
    for parent in list(packed.modules()):
        for name, layer in list(parent.named_children()):
            if layer in shapes:  # not in a head that only a training runs
                fuse = isinstance(parent, ConvNormAct) and isinstance(parent.norm, nn.Identity)
                relu6 = fuse and isinstance(parent.act, nn.ReLU6)
                setattr(parent, name, _PackedConv(layer, shapes[layer], relu6))
                if relu6:
                    parent.act = nn.Identity()
    for parent in list(packed.modules()):
        for name, block in list(parent.named_children()):
            if isinstance(block, DepthwiseSeparable) and block.act is not None and _is_bare(block.pointwise):
                setattr(parent, name, _PackedSeparable(block))
            elif (
                isinstance(block, InvertedResidual)
                and isinstance(block.shortcut, nn.Identity)
                and _is_bare(block.project)
            ):
                setattr(parent, name, _PackedResidual(block))
    for parent in list(packed.modules()):
        for name, layer in list(parent.named_children()):
            if _is_bare(layer):  # calling a layer that calls three others, two of them idle, is a twentieth of the time
                setattr(parent, name, layer.conv)
    return packed


def _is_bare(layer: nn.Module) -> TypeGuard[ConvNormAct]:
    """A packed convolution before which and behind which nothing is done."""
    return (
        isinstance(layer, ConvNormAct)
        and isinstance(layer.conv, _PackedConv)
        and isinstance(layer.norm, nn.Identity)
        and isinstance(layer.act, nn.Identity)
        and not layer.pads_itself
    )


class _Centred(nn.Module):
    """Pixels less their mean, a row of the image at a time: torch subtracts three numbers from each pixel twelve times slower.

    The standard deviation is in the weights of the first convolution. uint8 or float [B, 3, H, W] -> float [B, 3, H, W],
    channels-last; the padding of the convolution stays what it was, since a zero is a pixel of the mean colour as before.

    Args:
        mean: [1, 3, 1, 1], of the channels, in pixel values.
        width: W.
    """

    def __init__(self, mean: Tensor, width: int) -> None:
        super().__init__()
        self.row = mean.flatten().repeat(width)

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        rows = images.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(batch, height, -1)
        return torch.sub(rows, self.row).view(batch, height, width, channels).permute(0, 3, 1, 2)


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
        # The overload by name: looking for it takes a fifth of the time of a small convolution.
        result: Tensor = torch.ops.mkldnn._convolution_pointwise.default(
            x, self.weight, self.bias, *self.geometry, *self.activation
        )
        return result

    def plus(self, x: Tensor, other: Tensor, activation: str | None = None) -> Tensor:
        """The convolution of x plus another map of the result's shape, and "relu" behind the sum or None."""
        result: Tensor = torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, self.weight, self.bias, *self.geometry, "add", 1.0, activation, [], ""
        )
        return result


class _PackedSeparable(nn.Module):
    """See ``DepthwiseSeparable`` with a shortcut."""

    def __init__(self, block: DepthwiseSeparable) -> None:
        super().__init__()
        self.depthwise = block.depthwise
        assert isinstance(block.pointwise.conv, _PackedConv)
        self.pointwise = block.pointwise.conv

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        summed = self.pointwise.plus(self.depthwise(x), x if shortcut is None else shortcut, "relu")
        return summed.clamp_max_(6.0)  # oneDNN knows no ReLU6 behind a sum


class _PackedResidual(InvertedResidual):
    """An ``InvertedResidual`` with its input as shortcut; its layers are those of another."""

    def __init__(self, block: InvertedResidual) -> None:
        nn.Module.__init__(self)
        self.expand = block.expand
        self.depthwise = block.depthwise
        assert isinstance(block.project.conv, _PackedConv)
        self.output = block.project.conv

    def forward_with_inner(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        expanded = self.expand(x)
        filtered = self.depthwise(expanded)
        return self.output.plus(filtered, x), expanded, filtered
