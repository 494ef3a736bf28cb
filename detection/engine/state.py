"""The state of a training: all that going on needs, as one object that is saved and loaded."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from backbones.errors import UserError
from backbones.state import load_state
from detection.engine.checkpoint import save_checkpoint
from detection.engine.ema import ExponentialAverage
from detection.engine.log import Reading

_log = logging.getLogger(__name__)


@dataclass(slots=True, kw_only=True)
class TrainState:
    """Where a training stands.

    The position is ``epoch`` whole epochs and ``batch`` batches of the next one. A batch is that of all processes
    together, so the position means the same images for any number of processes.

    Attributes:
        model: the network that is trained.
        ema: its moving average, or None.
        optimizer, schedule, scaler: torch's.
        asked: the config that the training was started with, as plain data.
        config: the config as adopted: the same, with network and loss as they were built for the weights it began with.
        data: what tells the training data from other data ({} where that is not known): see ``Task.data_fingerprint``.
        world_size: number of processes.
        epoch: whole epochs done.
        batch: batches done in the epoch after these.
        step: optimiser steps done.
        readings: the windows of the losses in the unfinished epoch.
        window: the losses of the batches after these (``Meter.state``), None where there are none.
        learning_rates: of the last step, by the name of the parameter group.
        seconds: what the unfinished epoch took before this start of the run.
        num_left_out: batches that were left out because their loss or gradient was not finite.
        metrics: the last evaluation.
        best_metric, best_epoch: the best value of the task's metric (NaN before there is one) and its epoch (from 1).
        history: a record for each epoch, the lines of metrics.jsonl.
    """

    model: nn.Module
    ema: ExponentialAverage | None
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    scaler: torch.amp.GradScaler
    asked: Mapping[str, Any]
    config: Mapping[str, Any]
    data: Mapping[str, Any]
    world_size: int
    epoch: int = 0
    batch: int = 0
    step: int = 0
    readings: list[Reading] = field(default_factory=list)
    window: dict[str, Any] | None = None
    learning_rates: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    num_left_out: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    best_metric: float = math.nan
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def deployed(self) -> nn.Module:
        """The network that is evaluated and handed out: the moving average if there is one."""
        return self.ema.model if self.ema else self.model

    def save_weights(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the deployed weights, without what going on needs.

        Args:
            path: the file.
            extra: what travels with the weights: see ``Task.checkpoint_extra``.

        Raises:
            OSError: it cannot be written; an old file stays.
        """
        save_checkpoint(path, self._weights(extra))

    def save(self, path: Path, extra: Mapping[str, Any]) -> None:
        """Writes a checkpoint of the deployed weights with all that going on needs; see ``save_weights``."""
        training = {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "asked": self.asked,
            "data": self.data,
            "world_size": self.world_size,
            "batch": self.batch,
            "readings": [reading.to_plain() for reading in self.readings],
            "window": self.window,
            "learning_rates": self.learning_rates,
            "seconds": self.seconds,
            "num_left_out": self.num_left_out,
            "best_metric": self.best_metric,
            "best_epoch": self.best_epoch,
            "history": self.history,
        }
        save_checkpoint(path, self._weights(extra) | {"training": training})

    def load(self, content: Mapping[str, Any], source: Path) -> None:
        """Takes over the state in a checkpoint that ``save`` wrote.

        Args:
            content: of the checkpoint.
            source: its file, for messages.

        Raises:
            UserError: it is of a training on other data, or does not fit the network.
        """
        training = content["training"]
        self._check_data(training.get("data", {}), source)
        load_state(self.model, training["model"], str(source))
        self.optimizer.load_state_dict(training["optimizer"])
        self.schedule.load_state_dict(training["schedule"])
        self.scaler.load_state_dict(training["scaler"])
        if self.ema:
            self.ema.load_state_dict(training["ema"])
        was = training.get("world_size", self.world_size)
        if was != self.world_size:
            _log.warning(
                "%s: this run had %d process%s and goes on with %d: the same batches, but random "
                "numbers (dropout) and, without train.sync_norm, batch norms differ from what they would have been",
                source.parent, was, "" if was == 1 else "es", self.world_size,
            )  # fmt: skip
        self.epoch, self.step, self.metrics = content["epoch"], content["step"], content["metrics"]
        self.batch = training.get("batch", 0)
        self.readings = [Reading(**reading) for reading in training.get("readings", ())]
        self.window = training.get("window")
        self.learning_rates = training.get("learning_rates", {})
        self.seconds = training.get("seconds", 0.0)
        self.num_left_out = training.get("num_left_out", 0)
        self.best_metric, self.best_epoch = training["best_metric"], training["best_epoch"]
        self.history = training.get("history", [])

    def _weights(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "weights": self.deployed.state_dict(),
            "extra": extra,
            "epoch": self.epoch,
            "step": self.step,
            "metrics": self.metrics,
            "config": self.config,
        }

    def _check_data(self, data: Mapping[str, Any], source: Path) -> None:
        if not data or data == self.data:  # files from before it was recorded have none
            return
        changes = [f"{name} {was} -> {self.data.get(name)}" for name, was in data.items() if was != self.data.get(name)]
        raise UserError(
            f"{source}: this run was trained on other data ({'; '.join(changes)}). Files may lie elsewhere when a run is "
            f"resumed, but must hold the same images and boxes; start a new run in another --run-dir"
        )
