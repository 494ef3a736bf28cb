"""Batch norms folded into the convolutions before them, for prediction."""

from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from backbones.layers import ConvNormAct

_Module = TypeVar("_Module", bound=nn.Module)


def fold_norms(model: _Module) -> _Module:
    """Fold every batch norm into the convolution before it, in place: the same function with half the layers."""
    for module in model.modules():
        if isinstance(module, ConvNormAct) and isinstance(module.norm, nn.BatchNorm2d):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
    return model
