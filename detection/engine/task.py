"""What the training loop asks of its data and of its task: protocols, so that it knows neither classes nor boxes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

_Batch = TypeVar("_Batch", bound="TrainBatch")


class TrainBatch(Protocol):
    """A batch of training data.

    Attributes:
        skipped: "path: reason" of every image that could not be read while this batch was made.
        damaged: "path: what the decoder says" of every image in it that decoded to partly wrong pixels.
        image_ids: int64 [B], the numbers of its images; read before the batch goes to the device.
    """

    image_ids: Tensor
    skipped: list[str]
    damaged: list[str]

    def __len__(self) -> int:
        """Number of images."""

    def inputs(self) -> tuple[Tensor, ...]:
        """What the training step takes."""

    def to(self: _Batch, device: torch.device, non_blocking: bool = False) -> _Batch:
        """The same batch on another device."""


class TrainLoader(Protocol):
    """Batches of training data, as ``BatchLoader`` gives them.

    With several processes each one's loader gives its own share, and all of them the same number of batches.
    """

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The epoch of the next iteration and the batch that it begins with."""

    def __iter__(self) -> Iterator[Any]:
        """The batches (``TrainBatch``) of the epoch, from that one on."""


class Task(Protocol):
    """What is trained. The properties may as well be plain attributes."""

    @property
    def config(self) -> Any:
        """The composed config as adopted, a dataclass: with network and loss as they were built."""

    @property
    def step(self) -> nn.Module:
        """Called with a batch's inputs, gives scalar losses on the device; "loss" is minimised. Contains ``model``.

        With several processes the gradients are averaged over them: a loss that is divided by a sum over the images
        takes that sum over all processes and multiplies by their number.
        """

    @property
    def model(self) -> nn.Module:
        """The network whose weights are trained, averaged and saved."""

    @property
    def metric(self) -> str:
        """The entry of ``evaluate`` that decides which weights are the best; higher is better."""

    @property
    def num_train(self) -> int:
        """Number of training images."""

    @property
    def lr_scales(self) -> Mapping[str, float]:
        """Prefix of parameter names in ``model`` -> factor of the learning rate; {} for one rate."""

    def data_fingerprint(self) -> Mapping[str, int | str]:
        """What tells the training data from other data when a run is resumed: counts, a hash; no paths."""

    def train_loader(self) -> TrainLoader:
        """The training data. Called once."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Called on every process with ``model`` in evaluation mode; process 0's result counts."""

    def image_names(self, image_ids: Sequence[int]) -> list[str]:
        """The files of training images, by their numbers in a batch, for a message."""

    def checkpoint_extra(self) -> dict[str, Any]:
        """Tensors and plain data that travel with the weights: model config, class names, normalisation."""

    def log_images(self, writer: SummaryWriter, step: int, batch: Any, model: nn.Module) -> None:
        """Called on process 0 with a training batch on the device and ``model`` in evaluation mode."""
