"""A training step."""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from detection.benchmark.apart import Side, run_apart
from detection.benchmark.inputs import Inputs
from detection.benchmark.peer import build_peer
from detection.benchmark.timing import Comparison, compare, interleave
from detection.data.loader import build_loader
from detection.engine.optim import OptimConfig, build_optimizer, parameter_groups
from detection.engine.runtime import open_runtime
from detection.models.build import build_detector
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.structures import Batch
from detection.training.litedet_loss import LiteDetLossConfig
from detection.training.losses import TrainingStep
from detection.training.ssd_loss import SSDLossConfig
from detection.weights.info import DetectorInfo


def train(inputs: Inputs) -> Iterator[Comparison]:
    """Forward, loss, backward and optimiser of one batch that is in memory already."""
    size = inputs.config.batch_size
    arguments = training_arguments(inputs)
    sides = {  # a process each, because ours changes how memory is kept
        "ours": Side(own_step, arguments),
        "default": Side(peer_step, (*arguments, torch.contiguous_format)),
        "channels-last": Side(peer_step, (*arguments, torch.channels_last)),
    }
    with run_apart(sides) as calls:
        times = interleave(calls, max(inputs.config.rounds // 3, 2), warm_up=2)
    rate = 1e3 * size / statistics.median(times["ours"])
    inputs.notes.append(f"training: {rate:.1f} images a second")
    name = f"training step, batch {size}"
    yield compare(name, "torchvision", times["ours"], times["default"], bar=0.42)
    yield compare(name, "torchvision channels-last", times["ours"], times["channels-last"], bar=0.97)


def training_arguments(inputs: Inputs) -> tuple[DetectorInfo, dict[str, Tensor], Batch, int]:
    """What ``own_step`` and ``peer_step`` take: the detector, its weights, a batch, threads."""
    batch = next(iter(build_loader(inputs.training_set(), batch_size=inputs.config.batch_size)))
    batch.labels %= inputs.model.num_classes
    return inputs.info, inputs.model.state_dict(), batch, inputs.config.threads


@contextmanager
def own_step(
    info: DetectorInfo, weights: dict[str, Tensor], batch: Batch, threads: int
) -> Iterator[Callable[[], None]]:
    """A step of ours, in a process as ``litedet train`` prepares it."""
    with open_runtime("cpu", threads):
        model = build_detector(info.model, len(info.class_names))
        model.load_state_dict(weights)
        loss = LiteDetLossConfig() if isinstance(info.model, LiteDetConfig) else SSDLossConfig()
        step: nn.Module = TrainingStep(model, loss.build(model)).train()
        step = step.to(memory_format=torch.channels_last)
        config = OptimConfig(lr=0.01)
        optimizer = build_optimizer(parameter_groups(model, config, {}), config)

        def run() -> None:
            loss = step(*batch.inputs())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        yield run


@contextmanager
def peer_step(
    info: DetectorInfo, weights: dict[str, Tensor], batch: Batch, threads: int, memory_format: torch.memory_format
) -> Iterator[Callable[[], None]]:
    """A step of torchvision's, with SGD."""
    torch.set_num_threads(threads)
    peer = build_peer(_load(info, weights), info.postprocess).train().to(memory_format=memory_format)
    images = list(batch.images.contiguous().float() / 255)
    targets = [
        {"boxes": boxes[valid], "labels": labels[valid] + 1}
        for boxes, labels, valid in zip(batch.boxes, batch.labels, batch.valid, strict=True)
    ]
    optimizer = torch.optim.SGD(peer.parameters(), lr=0.01, momentum=0.9, weight_decay=4e-5)

    def run() -> None:
        loss = sum(peer(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    yield run


def _load(info: DetectorInfo, weights: dict[str, Tensor]) -> SSDLite:
    assert isinstance(info.model, SSDLiteConfig)
    model = SSDLite(info.model, len(info.class_names))
    model.load_state_dict(weights)
    return model
