"""Which layers suffer in eight bits: each alone is rounded, and the error of the network's outputs says how much it costs.

Letters in shapes: B batch, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from backbones.errors import UserError
from detection.engine.progress import progress_bar
from detection.export.module import Network

_LEVELS = 255  # steps of eight bits


@dataclass(kw_only=True, slots=True, frozen=True)
class LayerError:
    """What rounding one layer costs.

    Attributes:
        name: of the module, from the network down.
        decibels: signal to noise of the network's outputs with this layer alone in eight bits; less is worse.
    """

    name: str
    decibels: float


def layers_of(network: Network) -> dict[str, nn.Module]:
    """The convolutions and linear layers that a network runs, by name, in the order of the computation."""
    names = {
        module: name for name, module in network.module.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    found: dict[str, nn.Module] = {}
    hooks = [
        module.register_forward_pre_hook(lambda layer, _, name=name: found.setdefault(name, layer) and None)
        for module, name in names.items()
    ]
    with torch.no_grad():
        network.module(network.image)
    for hook in hooks:
        hook.remove()
    return found


def layer_errors(network: Network, images: NDArray[np.uint8]) -> list[LayerError]:
    """The layers by what eight bits in each of them alone cost, the worst first.

    A layer's weights are rounded symmetrically, a range for each output channel; its input and output to the range that these
    images give it, as the quantisers of all formats do it.

    Args:
        network: in floating point.
        images: uint8 [B, 3, H, W].
    """
    pixels = torch.from_numpy(images)
    found = []
    with torch.no_grad():
        exact = network.module(pixels)
        for name, layer in progress_bar(layers_of(network).items(), desc="layers", unit="layer", leave=False):
            with _rounded(layer):
                rounded = network.module(pixels)
            found.append(LayerError(name=name, decibels=_decibels(exact, rounded)))
    return sorted(found, key=lambda one: one.decibels)


def _decibels(exact: tuple[Tensor, ...], rounded: tuple[Tensor, ...]) -> float:
    """Of the worst output: 10 log10 of the variance of the exact numbers over the mean square of the error."""
    ratios = [
        float(one.double().var() / (one.double() - other.double()).square().mean().clamp(min=1e-30))
        for one, other in zip(exact, rounded, strict=True)
    ]
    return 10 * float(np.log10(min(ratios)))


@contextmanager
def _rounded(layer: nn.Module) -> Iterator[None]:
    """A layer in eight bits, for a while."""
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    kept = weight.data
    step = kept.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
    step = step.view(-1, *[1] * (kept.dim() - 1))
    weight.data = (kept / step).round() * step
    hooks = [
        layer.register_forward_pre_hook(lambda _, inputs: (_to_range(inputs[0]),)),
        layer.register_forward_hook(lambda _, inputs, output: _to_range(output)),
    ]
    try:
        yield
    finally:
        weight.data = kept
        for hook in hooks:
            hook.remove()


def _to_range(x: Tensor) -> Tensor:
    """Numbers rounded to 256 steps from their least (0 at most) to their largest (0 at least)."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = ((high - low) / _LEVELS).clamp(min=1e-12)
    return ((x - low) / step).round() * step + low


def chosen_layers(keep: tuple[str, ...], errors: list[LayerError]) -> tuple[str, ...]:
    """The layers that an option names: one number N, the N worst; or names, whole or the end of one ("head.box.0").

    Raises:
        UserError: a number of layers that are not there, or a name of none or of several.
    """
    names = [one.name for one in errors]
    if len(keep) == 1 and keep[0].isdigit():
        count = int(keep[0])
        if not 1 <= count <= len(names):
            raise UserError(f"--keep-float {count}: the network has {len(names)} layers")
        return tuple(names[:count])
    found = []
    for given in keep:
        fitting = [name for name in names if name == given or name.endswith(f".{given}")]
        if len(fitting) != 1:
            worst = ", ".join(names[:10])
            what = "no layer" if not fitting else f"{len(fitting)} layers"
            raise UserError(f"--keep-float {given} names {what}; the worst are {worst}")
        found += fitting
    return tuple(dict.fromkeys(found))


def as_lines(errors: list[LayerError], count: int = 10) -> list[str]:
    """The worst layers for people."""
    shown = errors[:count]
    width = max(len(one.name) for one in shown)
    head = f"layers by what 8 bits in each alone do to the outputs, the worst {len(shown)} of {len(errors)} (signal to noise):"
    return [head, *(f"  {one.name:<{width}}  {one.decibels:5.1f} dB" for one in shown)]
