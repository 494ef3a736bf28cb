"""Top-k accuracy of a classifier.

Letters in shapes: B batch, K classes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import UserError
from backbones.layers import Normalise

_NUM_NAMED = 5  # unreadable images named in a message


def count_correct(logits: Tensor, labels: Tensor, top: Sequence[int] = (1, 5)) -> Tensor:
    """How many images have their label among the k highest logits.

    Args:
        logits: float [B, K]. Not-a-numbers rank above the label.
        labels: int64 [B].
        top: the values of k; a k above K counts every image.

    Returns:
        int64 [len(top)].
    """
    of_label = logits.gather(1, labels[:, None])
    # Ties count against the label: a network that says the same of every class knows nothing.
    rank = (~(logits < of_label)).sum(1)
    return torch.stack([(rank <= k).sum() for k in top])


@dataclass(slots=True, kw_only=True)
class Accuracy:
    """Counts of an evaluation, or of the part of it that one process did.

    Attributes:
        counts: int64 [3] on the device: right at the first place, right among the first five, all.
        skipped: "path: reason" of every image that could not be read; they are in no count.
    """

    counts: Tensor
    skipped: list[str]

    def scalars(self) -> dict[str, float]:
        """The shares top1 and top5.

        Raises:
            UserError: not one image could be read.
        """
        top1, top5, total = self.counts.tolist()
        if total == 0:
            raise UserError(f"no image of the evaluation can be read: {'; '.join(self.skipped[:_NUM_NAMED])}")
        return {"top1": top1 / total, "top5": top5 / total}


@torch.inference_mode()
def measure_accuracy(model: nn.Module, loader: Iterable[Any], normalise: Normalise, device: torch.device) -> Accuracy:
    """Run a classifier, put in evaluation mode before, over the batches of a loader."""
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    skipped: list[str] = []
    for batch in loader:
        skipped += batch.skipped
        if len(batch) == 0:
            continue
        moved = batch.to(device, non_blocking=True)
        logits = model(normalise(moved.images))
        counts[:2] += count_correct(logits, moved.labels)
        counts[2] += len(batch)
    return Accuracy(counts=counts, skipped=skipped)
