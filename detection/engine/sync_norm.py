"""Batch norms that see the images of all processes: torch's on GPUs, and our own where torch's does not go."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def synchronise_norms(module: nn.Module, device: torch.device, *, compiled: bool = False) -> nn.Module:
    """The module with every batch norm in it made a synchronised one.

    Parameters and buffers stay the same objects. Frozen norms, which are in evaluation mode, work as before.

    Args:
        module: the training step.
        device: of the type that it will train on.
        compiled: whether it will be compiled. torch's own norm picks rows by their values, which is no part of a graph.
    """
    if device.type == "cuda" and not compiled:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)
    for child in module.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = SyncBatchNorm
    return module


class SyncBatchNorm(nn.BatchNorm2d):
    """A batch norm over all processes, on any device and in a compiled graph. In evaluation mode it is ``nn.BatchNorm2d``.

    ``nn.SyncBatchNorm`` has no code for a CPU, and DDP refuses it there. This stands in for norms of one and three dimensions
    too.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape and dtype; a process may have B = 0."""
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        result, mean, variance, count = _Normalise.apply(input.float(), self.weight, self.bias, self.eps)
        if self.track_running_stats:
            assert self.num_batches_tracked is not None
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            share = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * (count / (count - 1).clamp(min=1)), share)
        normalised: Tensor = result.to(input.dtype)
        return normalised

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"[B, C, ...] is needed, not {list(input.shape)}")


class _Normalise(torch.autograd.Function):
    """Batch norm by the mean and variance over all processes (arXiv 1502.03167, algorithm 1 and the gradients beneath it)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        axes, C = _axes(x), x.shape[1]
        sums = torch.cat([x.sum(axes, dtype=torch.float64), x.new_tensor([x.numel() // C], dtype=torch.float64)])
        dist.all_reduce(sums)
        count = sums[C].clamp(min=1)
        mean = sums[:C] / count
        squares = (x - _wide(mean.float(), x)).square().sum(axes, dtype=torch.float64)  # no difference of large sums
        dist.all_reduce(squares)
        mean, variance, count = mean.float(), (squares / count).float(), count.float()
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt(), count)
        ctx.mark_non_differentiable(mean, variance, count)
        return F.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, *of_statistics: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, scale, count = ctx.saved_tensors
        axes, C = _axes(x), x.shape[1]
        normal = (x - _wide(mean, x)) * _wide(scale, x)
        own = torch.cat([gradient.sum(axes), (gradient * normal).sum(axes)])
        sums = own.clone()
        dist.all_reduce(sums)
        of_sum, of_product = sums[:C] / count, sums[C:] / count
        factor = scale if weight is None else scale * weight
        of_x = _wide(factor, x) * (gradient - _wide(of_sum, x) - normal * _wide(of_product, x))
        return of_x, None if weight is None else own[C:], None if weight is None else own[:C], None


def _axes(x: Tensor) -> list[int]:
    """All but the channels."""
    return [0, *range(2, x.ndim)]


def _wide(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> [1, C, 1, ...] of as many axes as x."""
    return values.view(1, -1, *[1] * (x.ndim - 2))
