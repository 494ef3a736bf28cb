"""The training loop on a network of a few weights, against figures worked out by hand and against plain loops."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from detection.engine.checkpoint import load_checkpoint
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.engine.runtime import Runtime
from detection.engine.trainer import TrainConfig, train

CPU = Runtime(device=torch.device("cpu"))


@dataclass
class Points:
    """A batch: x [B, 3] and y [B, 1]."""

    x: Tensor
    y: Tensor
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.y

    def to(self, device: torch.device, non_blocking: bool = False) -> "Points":
        return replace(self, x=self.x.to(device), y=self.y.to(device))


class Loader:
    """Batches of a fixed set of points, shuffled by epoch; process ``rank`` gets its part of every batch."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.epochs: list[int] = []
        self.skipped: dict[int, list[str]] = {}

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[Points]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epochs[-1]))
        for i in range(len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size].chunk(self.world_size)[self.rank]
            yield Points(self.x[rows], self.y[rows], self.skipped.get(i, []))


class SquaredError(nn.Module):
    """Sum of squared errors over the number of points of all processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.broken_at: int | None = None
        self.calls = 0

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        count = torch.tensor(float(len(x)))
        if world_size > 1:
            dist.all_reduce(count)
        loss = (self.model(x) - y).float().square().sum() / count * world_size
        if self.broken_at is not None:
            if self.calls >= self.broken_at:
                loss = loss * math.nan
            self.calls += 1
        return {"loss": loss, "error": loss / 2}


class PointsTask:
    metric = "score"

    def __init__(
        self, model: nn.Module | None = None, *, num_points: int = 8, batch_size: int = 4, runtime: Runtime = CPU
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(num_points, 3, generator=generator)
        self.y = self.x @ torch.tensor([[1.0], [-2.0], [0.5]]) + 0.3
        torch.manual_seed(0)
        self.model = nn.Linear(3, 1) if model is None else model
        self.step: nn.Module = SquaredError(self.model)
        self.num_train = num_points
        self.lr_scales: dict[str, float] = {}
        self.loader = Loader(self.x, self.y, batch_size, runtime.rank, runtime.world_size)
        self.scores: list[float] | None = None
        self.stop_in_evaluation: int | None = None
        self.num_evaluations = 0
        self.pictures: list[tuple[int, bool]] = []

    def train_loader(self) -> Loader:
        return self.loader

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        self.num_evaluations += 1
        if self.num_evaluations == self.stop_in_evaluation:
            raise KeyboardInterrupt
        score = -float((model(self.x) - self.y).square().mean())
        return {"score": self.scores[self.num_evaluations - 1] if self.scores else score, "other": 1.0}

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"class_names": ["point"], "mean": torch.zeros(3)}

    def log_pictures(self, writer: SummaryWriter, step: int, batch: Points, model: nn.Module) -> None:
        self.pictures.append((step, model.training))


def config_of(**changes: Any) -> TrainConfig:
    """Plain gradient descent with a constant learning rate and no average, but for the changes."""
    plain: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 4,
        "optim": plain_optim(),
        "ema": EmaConfig(enabled=False),
        "log_every": 1,
    }
    return TrainConfig(**{**plain, **changes})


def plain_optim(**changes: Any) -> OptimConfig:
    plain: dict[str, Any] = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "warmup_steps": 0, "min_lr_share": 1.0}
    return OptimConfig(**{**plain, **changes})


def run(task: PointsTask, config: TrainConfig, run_dir: Path, runtime: Runtime = CPU) -> Any:
    return train(task, config, run_dir, runtime, {"train": {"epochs": config.epochs, "batch_size": config.batch_size}})


def test_weights_equal_a_plain_loop(tmp_path: Path) -> None:
    task, plain = PointsTask(), PointsTask()
    run(task, config_of(), tmp_path / "run")

    for epoch in range(2):
        plain.loader.set_epoch(epoch)
        for batch in plain.loader:
            loss = plain.step(*batch.inputs())["loss"]
            gradients = torch.autograd.grad(loss, list(plain.model.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(plain.model.parameters(), gradients, strict=True):
                    parameter -= 0.1 * gradient
    torch.testing.assert_close(task.model.state_dict(), plain.model.state_dict())
    assert task.loader.epochs == [0, 1]


def test_what_a_run_leaves(tmp_path: Path) -> None:
    task = PointsTask()
    task.scores = [0.5, 0.7, 0.6]
    result = run(task, config_of(epochs=3), tmp_path / "run")

    assert (result.best_metric, result.best_epoch, result.metrics) == (0.7, 2, {"score": 0.6, "other": 1.0})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "best.pt",
        "last.pt",
        "config.json",
        "metrics.jsonl",
        "tensorboard",
    }
    best, last = load_checkpoint(result.best_path), load_checkpoint(result.last_path)
    assert (best["epoch"], best["step"], best["metrics"]["score"]) == (2, 4, 0.7)
    assert (last["epoch"], last["step"], last["metrics"]["score"]) == (3, 6, 0.6)
    assert best["extra"]["class_names"] == ["point"]
    assert "training" not in best
    torch.testing.assert_close(last["weights"], dict(task.model.state_dict()))

    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"], line["best"]) for line in lines] == [
        (1, 2, True),
        (2, 4, True),
        (3, 6, False),
    ]
    assert set(lines[0]["losses"]) == {"loss", "error"}
    assert lines[0]["losses"]["error"] == pytest.approx(lines[0]["losses"]["loss"] / 2)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == {"train": {"epochs": 3, "batch_size": 4}}
    # pictures of the first batch, then after each evaluation, always in evaluation mode
    assert task.pictures == [(0, False), (2, False), (4, False), (6, False)]
