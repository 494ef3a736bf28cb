"""The layouts that other libraries give a MobileNetV2: key tables, and the network that a file's shapes belong to.

A key table goes ours -> theirs for every tensor of ``backbones.classifier.Classifier``; read backwards it loads.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from backbones.classifier import Classifier, ClassifierConfig
from backbones.mobilenetv2 import PAPER_SETTINGS, MobileNetV2Config

Layout = Literal["torchvision", "timm"]

PUBLIC_WIDTHS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1, 1.2, 1.3, 1.4)
# timm's mobilenetv2_110d and _120d: every stage but the first and the last has 1.2 or 1.4 times the blocks, rounded up.
DEEPER_BLOCKS = {1.1: (1, 3, 4, 5, 4, 4, 1), 1.2: (1, 3, 5, 6, 5, 5, 1)}

_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def torchvision_keys(config: MobileNetV2Config) -> dict[str, str]:
    """Key table ours -> torchvision's for a classifier (torchvision/models/mobilenetv2.py, 0.29).

    Theirs counts: features.0 the stem, one number for every block, one for the last convolution, classifier.1 the
    linear layer; inside a block the expansion, where there is one, moves the numbers behind it by one.
    """
    layers = {"backbone.stem": ("features.0.0", "features.0.1")}
    index = 0
    for ours, expansion, _, _ in _blocks(config):
        index += 1
        theirs = f"features.{index}.conv"
        place = 0
        if expansion > 1:
            layers[f"{ours}.expand"] = (f"{theirs}.0.0", f"{theirs}.0.1")
            place = 1
        layers[f"{ours}.depthwise"] = (f"{theirs}.{place}.0", f"{theirs}.{place}.1")
        layers[f"{ours}.project"] = (f"{theirs}.{place + 1}", f"{theirs}.{place + 2}")
    layers["backbone.last"] = (f"features.{index + 1}.0", f"features.{index + 1}.1")
    return _table(layers, "classifier.1")


def timm_keys(config: MobileNetV2Config) -> dict[str, str]:
    """Key table ours -> timm's for a classifier (timm/models/efficientnet.py, 1.0).

    Theirs: conv_stem and bn1, blocks.STAGE.BLOCK counted from 0, conv_head and bn2, classifier. The block without
    expansion names its pointwise convolution conv_pw, the others call the expansion so and the projection conv_pwl.
    """
    layers = {"backbone.stem": ("conv_stem", "bn1")}
    for ours, expansion, stage, block in _blocks(config):
        theirs = f"blocks.{stage}.{block}"
        if expansion > 1:
            layers[f"{ours}.expand"] = (f"{theirs}.conv_pw", f"{theirs}.bn1")
            layers[f"{ours}.depthwise"] = (f"{theirs}.conv_dw", f"{theirs}.bn2")
            layers[f"{ours}.project"] = (f"{theirs}.conv_pwl", f"{theirs}.bn3")
        else:
            layers[f"{ours}.depthwise"] = (f"{theirs}.conv_dw", f"{theirs}.bn1")
            layers[f"{ours}.project"] = (f"{theirs}.conv_pw", f"{theirs}.bn2")
    layers["backbone.last"] = ("conv_head", "bn2")
    return _table(layers, "classifier")


def layout_of(state: Mapping[str, Tensor]) -> Layout | None:
    """Whose names a state dict carries; None where they are not known."""
    if "features.0.0.weight" in state:
        return "torchvision"
    if "conv_stem.weight" in state and "blocks.0.0.conv_dw.weight" in state:
        return "timm"
    return None


def keys_of(layout: Layout, config: MobileNetV2Config) -> dict[str, str]:
    """The key table ours -> theirs of a layout."""
    return torchvision_keys(config) if layout == "torchvision" else timm_keys(config)


def public_configs() -> list[MobileNetV2Config]:
    """The networks that public weights exist for, as far as a file's shapes tell them apart."""
    configs = [MobileNetV2Config(width=width) for width in PUBLIC_WIDTHS]
    for width, counts in DEEPER_BLOCKS.items():
        settings = tuple((t, c, n, s) for (t, c, _, s), n in zip(PAPER_SETTINGS, counts, strict=True))
        configs.append(MobileNetV2Config(width=width, settings=settings, fixed_ends=True))
    return configs


def nearest_config(state: Mapping[str, Tensor], layout: Layout) -> tuple[MobileNetV2Config, bool]:
    """The public network that shares most convolutions, name and shape, with a state dict, and whether it shares all.

    Padding and epsilon show in no shape: both layouts' networks pad symmetrically and have 1e-5.
    """
    found = (MobileNetV2Config(), -1, False)
    for config, expected in zip(public_configs(), _public_shapes(layout), strict=True):
        same = sum(key in state and tuple(state[key].shape) == shape for key, shape in expected.items())
        # As many more in the file as in the network are no fit either: a shallower network is part of a deeper one.
        extra = sum(tensor.dim() == 4 and key not in expected for key, tensor in state.items())
        if same - extra > found[1]:
            found = (config, same - extra, same == len(expected) and not extra)
    return found[0], found[2]


def convolution_shapes(config: MobileNetV2Config, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of every convolution of the backbone, under the layout's names."""
    table = keys_of(layout, config)
    with torch.device("meta"):
        own = Classifier(ClassifierConfig(backbone=replace(config, frozen_stages=0)), 1).state_dict()
    return {table[key]: tuple(tensor.shape) for key, tensor in own.items() if key.endswith(".conv.weight")}


@cache
def _public_shapes(layout: Layout) -> list[dict[str, tuple[int, ...]]]:
    return [convolution_shapes(config, layout) for config in public_configs()]


def _blocks(config: MobileNetV2Config) -> list[tuple[str, int, int, int]]:
    """(our name, expansion, stage from 0, block from 0) of every inverted residual."""
    return [
        (f"backbone.stage{stage + 1}.{block}", expansion, stage, block)
        for stage, (expansion, _, num_blocks, _) in enumerate(config.settings)
        for block in range(num_blocks)
    ]


def _table(layers: Mapping[str, tuple[str, str]], linear: str) -> dict[str, str]:
    table = {}
    for layer, (conv, norm) in layers.items():
        table[f"{layer}.conv.weight"] = f"{conv}.weight"
        for name in _NORM_TENSORS:
            table[f"{layer}.norm.{name}"] = f"{norm}.{name}"
    return table | {"linear.weight": f"{linear}.weight", "linear.bias": f"{linear}.bias"}
