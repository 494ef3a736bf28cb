"""Steps whose loss or gradient is infinite or not a number: left out on the device, named and counted when losses are read."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from detection.engine.runtime import Runtime

_log = logging.getLogger(__name__)

_NUM_NAMED = 8  # images of a batch in a warning


@dataclass(slots=True)
class NonFiniteGuard:
    """Keeps such a step from the weights, as ``GradScaler`` does for fp16, and from the running statistics of batch norms.

    With several processes the gradient is the mean over all, so that all leave out the same steps. The host waits for the
    device in ``report`` alone.

    Attributes:
        runtime: this process.
        model: whose buffers are put back.
        image_names: the files of images by their numbers in a batch.
    """

    runtime: Runtime
    model: nn.Module
    image_names: Callable[[Sequence[int]], list[str]]
    _buffers: list[Tensor] = field(default_factory=list)
    _before: Tensor | None = None
    _bad_losses: list[Tensor] = field(default_factory=list)
    _left_out: list[Tensor] = field(default_factory=list)
    _images: list[Sequence[int]] = field(default_factory=list)
    _group: int = 0

    def begin_step(self) -> None:
        """Before the first batch of a step: remembers the buffers."""
        self._buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        self._before = torch.cat([buffer.flatten() for buffer in self._buffers]) if self._buffers else None
        self._group = 0

    def add(self, loss: Tensor, image_ids: Sequence[int]) -> None:
        """Takes in the loss ([] on the device) of a batch of these images."""
        self._bad_losses.append(~loss.detach().isfinite())
        self._images.append(image_ids)
        self._group += 1

    def end_step(self, gradient_norm: Tensor | None) -> Tensor:
        """After the last batch of a step, before the optimiser's: puts the buffers back where the step is left out.

        Args:
            gradient_norm: [] on the device, over all gradients; None where ``GradScaler`` looks at them: there a gradient
                that overflows is part of the search for its scale, and only a loss counts here.

        Returns:
            bool []: whether the step is left out.
        """
        bad = torch.stack(self._bad_losses[-self._group :]).any()
        left_out = bad if gradient_norm is None else ~gradient_norm.isfinite()
        self._left_out += [left_out] * self._group
        if self._before is not None:
            now = torch.cat([buffer.flatten() for buffer in self._buffers])
            kept = torch.where(left_out, self._before, now).split([buffer.numel() for buffer in self._buffers])
            pieces = [piece.view_as(buffer) for piece, buffer in zip(kept, self._buffers, strict=True)]
            torch._foreach_copy_(self._buffers, pieces)
        return left_out

    def report(self) -> int:
        """Names the images of the batches that were left out since the last report; gives the number of these batches.

        Every process has to call it after the same number of steps. With several processes each names its own images, and
        those of a batch with a good loss only where no process had a bad one.
        """
        if not self._left_out:
            return 0
        own = torch.stack(self._bad_losses).to(torch.int32)
        anywhere = self.runtime.sum_over_processes(own.clone())
        left_out = torch.stack(self._left_out).to(torch.int32)
        rows = torch.stack([own, anywhere, left_out]).tolist()
        num = 0
        for is_own, is_anywhere, is_left_out, image_ids in zip(*rows, self._images, strict=True):
            num += bool(is_left_out)
            if is_own or (is_left_out and not is_anywhere):
                names = self.image_names(image_ids)
                more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
                _log.warning(
                    "left out a batch, its %s is infinite or not a number: %s%s",
                    "loss" if is_own else "gradient", ", ".join(names[:_NUM_NAMED]), more,
                )  # fmt: skip
        self._bad_losses, self._left_out, self._images = [], [], []
        return num
