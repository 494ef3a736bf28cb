"""What a network that is only to predict computes at once: batch norms in the convolutions before them, outputs together."""

from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.layers import ConvNormAct
from detection.models.litedet import LiteDetHead

_Module = TypeVar("_Module", bound=nn.Module)


def fold_norms(model: _Module) -> _Module:
    """Fold every batch norm into the convolution before it, in place: the same function with half the layers."""
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return model


def merge_outputs(model: _Module) -> _Module:
    """Merge what can be computed at once in the heads of a detector that is only to predict, in place: the same function.

    Not for a file that is quantised: boxes and classes would share one scale.
    """
    for module in model.modules():
        if isinstance(module, LiteDetHead):
            module.merge_outputs()
    return model
