"""State dicts of torchvision and timm, read as ours and written back; ``layouts.py`` has the key tables."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.classifier import Classifier
from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.weights.layouts import Layout, keys_of, timm_keys, torchvision_keys


def to_torchvision(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict of a classifier in torchvision's layout.

    Raises:
        UserError: the config has something that torchvision's network has not.
    """
    config = classifier.backbone.config
    check_config(config, replace(_foreign_config(config), fixed_ends=False), "torchvision's network")
    table = torchvision_keys(config)
    return {table[key]: tensor for key, tensor in classifier.state_dict().items()}


def to_timm(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict of a classifier in timm's layout.

    Raises:
        UserError: the config has something that timm's network has not.
    """
    config = classifier.backbone.config
    check_config(config, _foreign_config(config), "timm's network")
    table = timm_keys(config)
    return {table[key]: tensor for key, tensor in classifier.state_dict().items()}


def from_foreign(
    theirs: Mapping[str, Tensor], layout: Layout, config: MobileNetV2Config, source: str | Path
) -> dict[str, Tensor]:
    """A state dict under the names of another library as one under ours, after the config was held against that library.

    Raises:
        UserError: the config has something that the library's network has not.
    """
    check_config(config, _foreign_config(config), str(source))
    table = {their_key: our_key for our_key, their_key in keys_of(layout, config).items()}
    state = {table.get(key, key): tensor for key, tensor in theirs.items()}
    for key in table.values():
        if key.endswith("num_batches_tracked"):  # counts batches and enters no result; old files lack it
            state.setdefault(key, torch.zeros((), dtype=torch.int64))
    return state


def check_config(config: MobileNetV2Config, of_file: MobileNetV2Config, source: str) -> None:
    """Raises UserError where two configs differ in a field that changes what the weights' numbers mean.

    Args:
        config: of the network that is to be filled.
        of_file: of the network that the weights were made for.
        source: of the weights, for the message.
    """
    differences: list[tuple[str, Any, Any]] = [
        (name, getattr(of_file, name), getattr(config, name))
        for name in MobileNetV2Config.fields_of_weights
        if getattr(of_file, name) != getattr(config, name)
    ]
    if differences:
        lines = [f"  {name}: the weights have {theirs!r}, the config {ours!r}" for name, theirs, ours in differences]
        advice = " ".join(f"{name}={theirs!r}" for name, theirs, _ in differences)
        raise UserError("\n".join([f"{source} was made for another backbone; set {advice}", *lines]))


def _foreign_config(config: MobileNetV2Config) -> MobileNetV2Config:
    """What torchvision's and timm's networks are where no shape tells it; width and settings show in the shapes."""
    return replace(config, residual="identity", padding="symmetric", norm_eps=1e-5)
