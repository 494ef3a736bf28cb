"""What a network costs on paper: parameters, multiply-adds and activations, by part."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from backbones.classifier import Classifier, ClassifierConfig
from detection.models.detector import Detector
from detection.models.ssdlite import SSDLite, SSDLiteConfig


class Count(NamedTuple):
    """What a part of a network costs for one image.

    Attributes:
        parameters: weights that are trained; statistics of batch norms are none.
        multiply_adds: of the convolutions and matrix products, one for a multiplication and an addition together. Batch
            norms, which are folded away, and activations are not counted, as in papers.
        activations: numbers that the convolutions and matrix products write.
    """

    parameters: int
    multiply_adds: int
    activations: int


def parts_of(model: nn.Module) -> Mapping[str, nn.Module]:
    """The parts of a detector (stem, stages, last, extras, head) or a classifier, in the order of the computation."""
    if isinstance(model, Detector | Classifier):
        return model.parts()
    return dict(model.named_children())


def count(model: nn.Module, size: tuple[int, int]) -> dict[str, Count]:
    """The cost of each part, and of the whole under "total".

    Multiply-adds come from torch's own counter (``torch.utils.flop_counter``), which follows what is executed.

    Args:
        model: takes one image [1, 3, H, W].
        size: (height, width) of the image in pixels.

    Raises:
        AssertionError: a layer lies in no part.
    """
    parts = parts_of(model)
    names = {module: name for name, module in model.named_modules()}
    layers = {
        name: [layer for layer in part.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        for name, part in parts.items()
    }
    written: dict[nn.Module, int] = {}

    def note(layer: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        written[layer] = written.get(layer, 0) + output.numel()

    hooks = [layer.register_forward_hook(note) for own in layers.values() for layer in own]
    was_training = model.training
    device = next(model.parameters()).device
    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model.eval()(torch.zeros(1, 3, *size, device=device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    flops = {key.partition(".")[2]: sum(by_operator.values()) for key, by_operator in counter.get_flop_counts().items()}
    counts = {
        name: Count(
            _parameters(part),
            sum(flops.get(names[layer], 0) for layer in layers[name]) // 2,  # it counts both as an operation
            sum(written.get(layer, 0) for layer in layers[name]),
        )
        for name, part in parts.items()
    }
    total = Count(_parameters(model), counter.get_total_flops() // 2, sum(written.values()))
    sums = [sum(column) for column in zip(*counts.values(), strict=True)]
    assert sums == list(total), f"the parts sum up to {sums}, the network has {total}"
    counts["total"] = total
    return counts


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def table(counts: Mapping[str, Count]) -> str:
    """The counts for people, in thousands and millions."""

    def lines() -> Iterator[str]:
        yield f"{'part':<8}  {'parameters':>12}  {'multiply-adds':>13}  {'activations':>12}"
        for name, part in counts.items():
            yield (
                f"{name:<8}  {part.parameters / 1e3:>10.1f} k  {part.multiply_adds / 1e6:>11.2f} M  "
                f"{part.activations / 1e3:>10.1f} k"
            )

    return "\n".join(lines())


def print_counts() -> None:
    """The tables of the networks that the papers give figures of."""
    for title, model, side in (
        ("MobileNetV2 x1.0, 1000 classes, 224x224", Classifier(ClassifierConfig(), 1000), 224),
        ("SSDLite, 80 classes, 320x320", SSDLite(SSDLiteConfig(), 80), 320),
    ):
        print(f"{title}\n{table(count(model, (side, side)))}\n")
