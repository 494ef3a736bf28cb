"""The learning rate range test (Smith, arXiv 1506.01186): a short training whose rate grows until the loss blows up."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from backbones.errors import UserError
from backbones.state import write_whole
from detection.engine.chart import save_figure
from detection.engine.config import TrainConfig
from detection.engine.loop import _autocast, _place_step
from detection.engine.optim import build_optimizer, parameter_groups
from detection.engine.progress import progress_bar
from detection.engine.runtime import Runtime, seed_everything
from detection.engine.task import Task

STEPS = 150
_MEMORY = 0.9  # of the moving average that smooths the loss
_BLOWN_UP = 4.0  # the test ends when the smoothed loss is so many times the lowest
_FIRST_STEPS = 10  # the smoothed loss has to settle before its lowest is looked for
_BELOW_LOWEST = 10.0  # the suggestion is so many times below the rate of the lowest loss


@dataclass(frozen=True, slots=True, kw_only=True)
class LrRange:
    """What a range test saw.

    Attributes:
        rates: ``train.optim.lr`` of each step; groups with a scale of their own keep it.
        losses: the loss at each step.
        smoothed: its moving average, corrected for its start.
        suggestion: a tenth of the rate at which the smoothed loss is lowest.
        diverged: whether the loss blew up before the highest rate.
    """

    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    suggestion: float
    diverged: bool

    @classmethod
    def of(cls, rates: list[float], losses: list[float], diverged: bool) -> LrRange:
        """Raises UserError where there are too few losses to see anything in."""
        if len(losses) <= _FIRST_STEPS:
            raise UserError(
                f"the loss was no longer finite after {len(losses)} steps; look at the data "
                "and the weights that it starts from"
            )
        smoothed = smooth(losses)
        lowest = min(range(_FIRST_STEPS, len(smoothed)), key=smoothed.__getitem__)
        return cls(
            rates=rates, losses=losses, smoothed=smoothed, suggestion=rates[lowest] / _BELOW_LOWEST, diverged=diverged
        )

    def write(self, folder: Path) -> tuple[Path, Path]:
        """``lr_finder.json`` and ``lr_finder.png`` in a folder; gives both paths.

        Raises:
            OSError: one cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        data, picture = folder / "lr_finder.json", folder / "lr_finder.png"
        write_whole(data, (json.dumps(asdict(self), indent=2) + "\n").encode())

        def draw(axes: Any) -> None:
            axes.plot(self.rates, self.losses, color="#bbbbbb", label="loss")
            axes.plot(self.rates, self.smoothed, label="smoothed")
            axes.axvline(self.suggestion, color="#d9480f", linestyle="--", label=f"suggestion {self.suggestion:.2g}")
            axes.set(xscale="log", xlabel="train.optim.lr", ylabel="loss")
            axes.set_ylim(
                0.9 * min(*self.smoothed, *self.losses), 1.1 * min(max(self.smoothed), 2.5 * self.smoothed[0])
            )
            axes.legend()
            axes.grid(alpha=0.3)

        save_figure(picture, [draw])
        return data, picture


def smooth(losses: list[float]) -> list[float]:
    """Moving average of a list, corrected for its start at 0."""
    average, result = 0.0, []
    for number, loss in enumerate(losses, 1):
        average = _MEMORY * average + (1 - _MEMORY) * loss
        result.append(average / (1 - _MEMORY**number))
    return result


def find_lr(
    task: Task, config: TrainConfig, runtime: Runtime, *, steps: int = STEPS, low: float = 1e-6, high: float = 10.0
) -> LrRange:
    """Train for some steps with a rate that grows exponentially from ``low`` to ``high``.

    The weights of ``task.model`` are changed; nothing is written. A training that follows in another process, with the same
    seed, begins as if there had been no test. One step is one batch: ``config.accumulate`` has no part in it.

    Raises:
        UserError: several processes; too few images for a batch; a loss that is not finite from the start.
    """
    config.validate()
    if runtime.world_size > 1:
        raise UserError("--find-lr runs in one process; start it without torchrun")
    if not len(task.train_loader()):
        raise UserError(
            f"{task.num_train} training images give no batch of {config.batch_size}; lower --train.batch-size"
        )
    seed_everything(config.seed)
    module = _place_step(task.step, config, runtime)
    groups = parameter_groups(task.model, config.optim, task.lr_scales)
    optimizer = build_optimizer(groups, config.optim)
    scales = [group["lr"] / config.optim.lr for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=config.amp == "fp16")
    module.train()
    rates: list[float] = []
    losses: list[float] = []
    lowest, average, diverged = math.inf, 0.0, False
    for number, batch in enumerate(
        progress_bar(_batches(task, steps), total=steps, desc="range test", unit="step", leave=False)
    ):
        rate = low * (high / low) ** (number / max(steps - 1, 1))
        for group, scale in zip(optimizer.param_groups, scales, strict=True):
            group["lr"] = rate * scale
        with _autocast(config.amp, runtime.device):
            loss = module(*batch.to(runtime.device, non_blocking=True).inputs())["loss"]
        value = float(loss.detach())
        if not math.isfinite(value):
            diverged = True
            break
        rates.append(rate)
        losses.append(value)
        average = _MEMORY * average + (1 - _MEMORY) * value
        smoothed = average / (1 - _MEMORY ** len(losses))
        if len(losses) > _FIRST_STEPS:
            lowest = min(lowest, smoothed)
            if smoothed > _BLOWN_UP * lowest:
                diverged = True
                break
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if config.optim.clip_norm is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
        scaler.step(optimizer)
        scaler.update()
    return LrRange.of(rates, losses, diverged)


def _batches(task: Task, steps: int) -> Iterator[Any]:
    """So many batches, over again where the training images are fewer."""
    given = 0
    while given < steps:
        for batch in task.train_loader():
            yield batch
            given += 1
            if given == steps:
                return
