"""The contract that every loss of a detector meets: between the loss, its config and the training step.

Letters in shapes: B batch, A anchors, M objects of an image (padded).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

import torch
import torch.distributed
from torch import Tensor, nn

from detection.models.detector import Detector, DetectorConfig
from detection.structures import RawPredictions, Target

_Config = TypeVar("_Config", bound="LossConfig")


class LossConfig(ABC):
    """How a loss is computed. Each kind of loss has one dataclass derived from this.

    Attributes:
        kind: of the loss, which tells the dataclasses apart in a file; ``detection.training.config`` has the table.
    """

    __slots__ = ()

    kind: str

    @abstractmethod
    def validate(self) -> None:
        """Raises UserError for values that make no sense, alone or together."""

    @abstractmethod
    def check(self, model: DetectorConfig) -> None:
        """Raises UserError if this loss does not train the kind of output that the network has."""

    @abstractmethod
    def fitted(self: _Config, model: DetectorConfig) -> tuple[_Config, str]:
        """A config that does train this network's output, and a sentence on what was changed ("" if nothing was)."""

    @abstractmethod
    def build(self, model: Detector) -> DetectionLoss:
        """The loss for a network.

        Raises:
            UserError: it does not train the kind of output that the network has.
        """


class DetectionLoss(nn.Module, ABC):
    """Compares the raw predictions for a batch with its objects.

    A loss treats the whole batch at once: no loop over images, no boolean indexing, nothing that makes the host wait for the
    device, so that the step compiles into one graph and the GPU does not idle.
    """

    @abstractmethod
    def forward(self, raw: RawPredictions, target: Target) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            raw: predictions [B, A, ...]; half precision is fine, the loss is computed in float32.
            target: objects [B, M, ...] in pixels of the network's input.

        Returns:
            Scalars: ``loss``, to be minimised; its parts; and, for the log, ``positives`` (matched anchors per image).
        """


class TrainingStep(nn.Module):
    """Network and loss as one module, which is compiled, wrapped in DDP and called once per step.

    Args:
        model: the network.
        loss: between its predictions and the objects.
        distillation: images, raw predictions -> further parts of the loss, by name; None: there is no teacher.
    """

    def __init__(self, model: Detector, loss: DetectionLoss, distillation: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.distillation = distillation

    def forward(self, images: Tensor, boxes: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """uint8 images [B, 3, H, W] and the fields of ``Target`` -> scalar losses; ``loss`` is the one to minimise.

        ``positives_per_object`` is for the log: matched anchors for each object of the batch.
        """
        raw = self.model(images)
        losses: dict[str, Tensor] = self.loss(raw, Target(boxes, labels, valid))
        if self.distillation is not None:
            more = self.distillation(images, raw)
            losses = {**losses, **more, "loss": losses["loss"] + sum(more.values())}
        # of the batch of one process: few of these mean an assigner that does not fit the data
        losses["positives_per_object"] = losses["positives"] * len(images) / valid.sum().clamp(min=1)
        return losses


def normaliser_over_processes(value: Tensor) -> Tensor:
    """What a process divides its errors by, so that the mean over processes is what one process alone would get.

    Args:
        value: [], this process's part of what that one would divide by; all parts together count as at least 1.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        import torch.distributed._functional_collectives as collectives  # in-graph, unlike dist.all_reduce

        total: Tensor = collectives.all_reduce(value, "sum", torch.distributed.group.WORLD)  # type: ignore[arg-type]
        return total.clamp(min=1.0) / torch.distributed.get_world_size()
    return value.clamp(min=1.0)
