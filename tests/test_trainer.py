"""The training loop on a network of a few weights, against figures worked out by hand and against plain loops."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.tensorboard import SummaryWriter

from backbones.errors import UserError
from detection.engine.checkpoint import load_checkpoint, save_checkpoint
from detection.engine.config import TrainConfig
from detection.engine.ema import EmaConfig
from detection.engine.files import from_main, open_run
from detection.engine.loop import train
from detection.engine.optim import OptimConfig
from detection.engine.plain import from_plain
from detection.engine.runtime import Runtime, open_runtime

CPU = Runtime(device=torch.device("cpu"))


@dataclass
class Points:
    """A batch: x [B, 3] and y [B, 1]."""

    x: Tensor
    y: Tensor
    skipped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    image_ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.x)

    def inputs(self) -> tuple[Tensor, ...]:
        return self.x, self.y

    def to(self, device: torch.device, non_blocking: bool = False) -> "Points":
        return replace(self, x=self.x.to(device), y=self.y.to(device))


class Killed(BaseException):
    """The process ends here, with nothing done any more."""


class Loader:
    """Batches of a fixed set of points, shuffled by epoch; process ``rank`` gets its part of every batch."""

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.x, self.y = x, y
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.epochs: list[int] = []
        self.left_out: int | None = None  # a batch that does not come
        self.poisoned: int | None = None  # a batch of numbers that are none
        self.skipped: dict[int, list[str]] = {}
        self.damaged: dict[int, list[str]] = {}

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epochs.append(epoch)
        self.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.x) // self.batch_size - (self.left_out is not None)

    def __iter__(self) -> Iterator[Points]:
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.epochs[-1]))
        for i in range(self.first_batch, len(self.x) // self.batch_size):
            if i == self.left_out:
                continue
            rows = order[i * self.batch_size : (i + 1) * self.batch_size].chunk(self.world_size)[self.rank]
            if i == self.poisoned:
                yield Points(self.x[rows] * math.nan, self.y[rows], image_ids=rows)
                continue
            yield Points(self.x[rows], self.y[rows], self.skipped.get(i, []), self.damaged.get(i, []), rows)


class SquaredDistance(nn.Module):
    """Sum of squared errors over the number of points of all processes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.broken_from: int | None = None  # first call with a broken result
        self.broken: Literal["loss", "gradient"] = "loss"
        self.calls = 0
        self.before_call: Any = lambda: None

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.before_call()
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        count = torch.tensor(float(len(x)))
        if world_size > 1:
            dist.all_reduce(count)
        loss = (self.model(x) - y).float().square().sum() / count * world_size
        if self.broken_from is not None:
            if self.calls >= self.broken_from:
                # the square root of 0 has an infinite slope
                loss = loss * math.nan if self.broken == "loss" else loss + (0 * loss).sqrt()
            self.calls += 1
        return {"loss": loss, "error": loss / 2}


@dataclass
class PointsData:
    workers: int = 0
    folder: str = "a"


@dataclass
class PointsConfig:
    run_dir: Path
    train: TrainConfig
    data: PointsData = field(default_factory=PointsData)
    depth: int = 1


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
        self.step = SquaredDistance(self.model)
        self.num_train = num_points
        self.lr_scales: dict[str, float] = {}
        self.loader = Loader(self.x, self.y, batch_size, runtime.rank, runtime.world_size)
        self.scores: list[float] | None = None
        self.stop_in_evaluation: int | None = None
        self.num_evaluations = 0
        self.images: list[tuple[int, bool]] = []
        self.config: Any = None

    def data_fingerprint(self) -> dict[str, int | str]:
        return {"points": len(self.x), "content": round(float(self.x.sum()), 4)}

    def train_loader(self) -> Loader:
        return self.loader

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        self.num_evaluations += 1
        if self.num_evaluations == self.stop_in_evaluation:
            raise Killed
        score = -float((model(self.x) - self.y).square().mean())
        return {"score": self.scores[self.num_evaluations - 1] if self.scores else score, "other": 1.0}

    def image_names(self, image_ids: Sequence[int]) -> list[str]:
        return [f"{number}.jpg" for number in image_ids]

    def checkpoint_extra(self) -> dict[str, Any]:
        return {"class_names": ["point"], "mean": torch.zeros(3)}

    def log_images(self, writer: SummaryWriter, step: int, batch: Points, model: nn.Module) -> None:
        self.images.append((step, model.training))


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


def run(task: PointsTask, config: TrainConfig, run_dir: Path, runtime: Runtime = CPU, **changes: Any) -> Any:
    task.config = PointsConfig(run_dir, config, **changes)
    with open_run(task.config, runtime, lambda plain: from_plain(plain, PointsConfig)) as opened:
        return train(task, config, opened, runtime)


def losses_of(run_dir: Path) -> list[float]:
    """The mean loss of each epoch, as it was written down."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["losses"]["loss"] for line in lines]


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
        ".lock",
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
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["train"]["epochs"], record["train"]["batch_size"], record["depth"]) == (3, 4, 1)
    # images of the first batch, then after each evaluation, always in evaluation mode
    assert task.images == [(0, False), (2, False), (4, False), (6, False)]


def test_accumulation_equals_a_bigger_batch(tmp_path: Path) -> None:
    whole, parts = PointsTask(num_points=8, batch_size=4), PointsTask(num_points=8, batch_size=2)
    run(whole, config_of(batch_size=4), tmp_path / "whole")
    result = run(parts, config_of(batch_size=2, accumulate=2), tmp_path / "parts")
    torch.testing.assert_close(parts.model.state_dict(), whole.model.state_dict())
    assert load_checkpoint(result.last_path)["step"] == 4


def test_last_group_of_batches_may_be_smaller(tmp_path: Path) -> None:
    task, plain = PointsTask(num_points=6, batch_size=2), PointsTask(num_points=6, batch_size=2)
    result = run(task, config_of(epochs=1, batch_size=2, accumulate=2), tmp_path / "run")
    assert load_checkpoint(result.last_path)["step"] == 2

    plain.loader.set_epoch(0)
    a, b, c = plain.loader
    for group in ([a, b], [c]):
        loss = torch.stack([plain.step(*batch.inputs())["loss"] for batch in group]).mean()
        gradients = torch.autograd.grad(loss, list(plain.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(plain.model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    torch.testing.assert_close(task.model.state_dict(), plain.model.state_dict())


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_clipping_limits_the_step(tmp_path: Path, amp: Literal["off", "fp16"]) -> None:
    task = PointsTask(num_points=4)
    with torch.no_grad():  # near the solution: the gradient is longer than 0.01, yet in the range of a scaled float16
        task.model.weight.copy_(torch.tensor([[1.0, -2.0, 0.5]]))
        task.model.bias.fill_(0.35)
    before = torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])
    run(task, config_of(epochs=1, amp=amp, optim=plain_optim(clip_norm=0.01)), tmp_path / "run")
    after = torch.cat([parameter.detach().flatten() for parameter in task.model.parameters()])
    assert (after - before).norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # lr * clip_norm


@pytest.mark.parametrize(("amp", "dtype"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_precision_of_the_forward_pass(tmp_path: Path, amp: Literal["off", "bf16", "fp16"], dtype: torch.dtype) -> None:
    task, exact = PointsTask(), PointsTask()
    seen: list[tuple[bool, torch.dtype]] = []
    task.model.register_forward_hook(lambda module, inputs, output: seen.append((module.training, output.dtype)))
    # enough steps to converge: fp16 leaves out the first ones, until the scale of the loss has come down
    result = run(task, config_of(amp=amp, epochs=20), tmp_path / "run")
    run(exact, config_of(epochs=20), tmp_path / "exact")

    assert {kind for training, kind in seen if training} == {dtype}
    assert {kind for training, kind in seen if not training} == {torch.float32}  # the evaluation
    assert task.model.weight.dtype == torch.float32
    torch.testing.assert_close(task.model.weight, exact.model.weight, rtol=0.02, atol=0.02)
    assert (load_checkpoint(result.last_path)["training"]["scaler"] != {}) == (amp == "fp16")


def test_overflowing_fp16_gradients_are_left_out(tmp_path: Path) -> None:
    task = PointsTask()
    before = task.model.weight.detach().clone()
    task.y *= 3e5  # finite in the float32 loss; its gradient leaves the range of float16 at any of four loss scales
    task.loader.y = task.y
    result = run(task, config_of(amp="fp16", optim=plain_optim(clip_norm=1.0)), tmp_path / "run")
    assert load_checkpoint(result.last_path)["training"]["scaler"]["scale"] == 65536.0 / 2**4
    torch.testing.assert_close(task.model.weight.detach(), before, rtol=0, atol=0)


def test_best_weights_are_the_average(tmp_path: Path) -> None:
    task = PointsTask()
    result = run(task, config_of(epochs=4, ema=EmaConfig(horizon_share=0.5)), tmp_path / "run")
    last = load_checkpoint(result.last_path)
    torch.testing.assert_close(last["weights"], last["training"]["ema"]["model"], rtol=0, atol=0)
    torch.testing.assert_close(dict(last["training"]["model"]), dict(task.model.state_dict()), rtol=0, atol=0)
    assert last["training"]["ema"]["num_updates"] == 8
    assert not torch.equal(last["weights"]["weight"], last["training"]["model"]["weight"])
    # what was evaluated is what was saved
    averaged = nn.Linear(3, 1)
    averaged.load_state_dict(last["weights"])
    with torch.no_grad():
        assert result.metrics["score"] == pytest.approx(-float((averaged(task.x) - task.y).square().mean()), rel=1e-5)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_a_batch_without_a_finite_loss_is_named_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, amp: Literal["off", "fp16"]
) -> None:
    """Weights, running statistics and mean losses are those of a training that never saw it."""

    def task_with(poisoned: bool) -> PointsTask:
        torch.manual_seed(5)
        task = PointsTask(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)), num_points=12)
        if poisoned:
            task.loader.poisoned = 1
        else:
            task.loader.left_out = 1
        return task

    bad, good = task_with(poisoned=True), task_with(poisoned=False)
    config = config_of(epochs=1, amp=amp, ema=EmaConfig(enabled=False), log_every=2)
    run(bad, config, tmp_path / "bad")
    state = bad.model.state_dict()
    assert all(tensor.isfinite().all() for tensor in state.values())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))[4:8].tolist()
    named = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    images = ", ".join(f"{number}.jpg" for number in order)
    assert named == [f"left out a batch, its loss is infinite or not a number: {images}"]
    assert load_checkpoint(tmp_path / "bad" / "last.pt")["training"]["num_left_out"] == 1

    run(good, config, tmp_path / "good")
    expected = good.model.state_dict()
    for tensors in (state, expected):
        del tensors["0.num_batches_tracked"]
    torch.testing.assert_close(state, expected)
    assert losses_of(tmp_path / "bad") == pytest.approx(losses_of(tmp_path / "good"))


def test_too_many_such_batches_end_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = PointsTask()
    task.step.broken_from, task.step.broken = 3, "gradient"  # from the second batch of the second epoch
    message = r"3 batches of this run had a loss .* more than --train\.max-left-out 2; this is epoch 3, step 6\. Lower"
    with pytest.raises(FloatingPointError, match=message):
        run(task, config_of(epochs=9, log_every=20, max_left_out=2), tmp_path / "run")
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert last["epoch"] == 2
    assert last["weights"]["weight"].isfinite().all()
    assert caplog.text.count("left out a batch, its gradient is infinite or not a number: ") == 3


def test_weights_that_break_are_not_saved(tmp_path: Path) -> None:
    task = PointsTask()
    with torch.no_grad():
        task.model.weight.fill_(1e38)
    task.step.forward = lambda x, y: {"loss": (task.model.weight * -1.0).sum()}  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match=r"weights are no longer finite in epoch 1, after step 2"):
        run(task, config_of(optim=plain_optim(lr=3e38)), tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), None])
def test_full_memory_names_the_settings(tmp_path: Path, error: Exception | None) -> None:
    task = PointsTask()

    def fill() -> None:
        if error is not None:
            raise error
        torch.empty(1 << 60, dtype=torch.uint8)

    task.step.before_call = fill
    with pytest.raises(
        UserError, match=r"memory is full: lower --train\.batch-size \(now 4; 2 with --train\.accumulate 2"
    ):
        run(task, config_of(), tmp_path / "run")


def test_memory_that_is_full_in_an_evaluation_names_its_setting(tmp_path: Path) -> None:
    class Large(PointsTask):
        def evaluate(self, model: nn.Module) -> dict[str, float]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(
        UserError, match=r"memory is full: .*lower --data\.val-batch-size\. torch says: CUDA out of memory"
    ):
        run(Large(), config_of(), tmp_path / "run")


def test_first_result_that_is_a_number_beats_nan(tmp_path: Path) -> None:
    task = PointsTask()
    task.scores = [math.nan, 0.1, math.nan]
    result = run(task, config_of(epochs=3), tmp_path / "run")
    assert (result.best_metric, result.best_epoch) == (0.1, 2)
    assert load_checkpoint(result.best_path)["epoch"] == 2


def test_evaluations_are_as_rare_as_asked_for_and_after_the_last_epoch(tmp_path: Path) -> None:
    task = PointsTask()
    run(task, config_of(epochs=4, eval_every=3), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [bool(line["metrics"]) for line in lines] == [False, False, True, True]
    assert task.num_evaluations == 2


def deep_task() -> PointsTask:
    torch.manual_seed(5)
    return PointsTask(
        nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1)), num_points=12
    )


def deep_config(**changes: Any) -> TrainConfig:
    optim = OptimConfig(name="adamw", lr=0.01, warmup_steps=3, warmup_max_share=0.5, clip_norm=1.0)
    return config_of(**{"epochs": 4, "optim": optim, "ema": EmaConfig(horizon_share=0.3), **changes})


def test_resumed_run_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    straight = deep_task()
    result = run(straight, deep_config(), tmp_path / "straight")

    stopped = deep_task()
    stopped.stop_in_evaluation = 3
    with pytest.raises(Killed):
        run(stopped, deep_config(), tmp_path / "stopped")
    with (tmp_path / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "left by": "a run that ended after this line and before its checkpoint"}\n')
    torch.manual_seed(77)  # a new process begins elsewhere
    resumed = PointsTask(deep_task().model, num_points=12)
    again = run(resumed, deep_config(resume=True), tmp_path / "stopped")

    assert resumed.loader.epochs == [2, 3]
    torch.testing.assert_close(resumed.model.state_dict(), straight.model.state_dict(), rtol=0, atol=1e-6)
    one, other = load_checkpoint(result.last_path), load_checkpoint(again.last_path)
    torch.testing.assert_close(other["weights"], one["weights"], rtol=0, atol=1e-6)
    assert (other["step"], other["epoch"]) == (one["step"], one["epoch"]) == (12, 4)
    assert again.best_epoch == result.best_epoch
    assert again.best_metric == pytest.approx(result.best_metric, abs=1e-6)
    assert losses_of(tmp_path / "stopped") == pytest.approx(losses_of(tmp_path / "straight"), abs=1e-6)


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two trees of tensors and plain data differ, if only in one bit."""
    if isinstance(a, Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict):
        found = [] if a.keys() == b.keys() else [f"{place}: {a.keys() ^ b.keys()}"]
        return found + [text for key in a.keys() & b.keys() for text in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [text for i in range(len(a)) for text in differences(a[i], b[i], f"{place}[{i}]")]
    return [] if a == b else [f"{place}: {a!r} and {b!r}"]


def everything_of(run_dir: Path) -> tuple[Any, list[Any], dict[str, Any]]:
    """All that must not depend on where a run was stopped: checkpoint, losses of the epochs, curves of TensorBoard."""
    content = load_checkpoint(run_dir / "last.pt")
    training = {name: content["training"][name] for name in ("model", "ema", "optimizer", "schedule", "scaler")}
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(1, len(records) + 1))
    names = ("epoch", "step", "lr", "losses", "metrics", "best")
    kept = [{name: record[name] for name in names} for record in records]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.startswith("speed/")
    }
    return (
        {"weights": content["weights"], "step": content["step"], "metrics": content["metrics"], **training},
        kept,
        curves,
    )


def assert_same_run(one: Path, other: Path) -> None:
    ours, theirs = everything_of(one), everything_of(other)
    assert differences(ours[0], theirs[0]) == []
    assert ours[1:] == theirs[1:]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_killed_at_every_step(tmp_path: Path, accumulate: int) -> None:
    """One training of 4 epochs of 3 batches that dies in each of its batches, dropout and augmented order included."""

    def config(**changes: Any) -> TrainConfig:
        return deep_config(checkpoint_every_steps=1, log_every=2, accumulate=accumulate, **changes)

    run(deep_task(), config(), tmp_path / "straight")
    deaths = 0
    while True:
        task, torch_seed = deep_task(), 77 + deaths
        torch.manual_seed(torch_seed)  # a new process begins elsewhere
        batches = []

        def die(batches: list[int] = batches) -> None:
            batches.append(0)
            if len(batches) == accumulate + 1:
                raise Killed

        task.step.before_call = die
        try:
            run(task, config(resume=deaths > 0), tmp_path / "killed")
        except Killed:
            # TensorBoard reads the files by the second in their name, and many of these fall into one
            (events,) = (tmp_path / "killed" / "tensorboard").glob(f"*.{os.getpid()}.*")
            events.rename(events.with_name(f"events.out.tfevents.{deaths:010d}"))
            deaths += 1
        else:
            break
    assert deaths == (11 if accumulate == 1 else 7)
    assert_same_run(tmp_path / "killed", tmp_path / "straight")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", ["step", "last step", "evaluation"])
def test_signals_end_the_step_and_keep_it(tmp_path: Path, number: signal.Signals, at: str) -> None:
    run(deep_task(), deep_config(log_every=2), tmp_path / "straight")
    stopped, calls = deep_task(), []

    def send() -> None:
        calls.append(0)
        if len(calls) == {"step": 2, "last step": 3}.get(at):
            signal.raise_signal(number)

    stopped.step.before_call = send
    if at == "evaluation":
        evaluate = stopped.evaluate
        stopped.evaluate = lambda model: signal.raise_signal(number) or evaluate(model)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt) as ended:
        run(stopped, deep_config(log_every=2), tmp_path / "stopped")
    assert getattr(ended.value, "status", 130) == 128 + number
    assert signal.getsignal(number) == before
    content = load_checkpoint(tmp_path / "stopped" / "last.pt")
    done = 2 if at == "step" else 3
    assert (content["epoch"], content["step"], content["training"]["batch"]) == (0, done, done)
    run(deep_task(), deep_config(log_every=2, resume=True), tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "straight")


def test_a_second_signal_does_not_wait_for_the_step(tmp_path: Path) -> None:
    task = PointsTask()
    task.step.before_call = lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)]
    with pytest.raises(KeyboardInterrupt):
        run(task, config_of(), tmp_path / "run")
    assert not (tmp_path / "run" / "last.pt").exists()


def test_checkpoints_by_time(tmp_path: Path) -> None:
    task = PointsTask()
    seen: list[int] = []

    def look() -> None:
        if (tmp_path / "run" / "last.pt").exists():
            seen.append(load_checkpoint(tmp_path / "run" / "last.pt")["step"])

    task.step.before_call = look
    run(task, config_of(checkpoint_every_minutes=1e-9), tmp_path / "run")
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_memory_format_does_not_change_the_training(tmp_path: Path, name: Literal["sgd", "adamw"]) -> None:
    # The fused optimisers walk through weights, gradients and their own state in the order of memory.
    def task() -> PointsTask:
        torch.manual_seed(5)
        layers = [
            nn.Linear(3, 18),
            nn.Unflatten(1, (2, 3, 3)),
            nn.Conv2d(2, 4, 3, padding=1),
            nn.Flatten(),
            nn.Linear(36, 1),
        ]
        return PointsTask(nn.Sequential(*layers))

    def config(**changes: Any) -> TrainConfig:
        return config_of(epochs=2, optim=OptimConfig(name=name, lr=0.01), ema=EmaConfig(horizon_share=0.5), **changes)

    plain, last, resumed = task(), task(), task()
    run(plain, config(channels_last=False), tmp_path / "plain")
    last.stop_in_evaluation = 2
    with pytest.raises(Killed):
        run(last, config(), tmp_path / "last")
    run(resumed, config(resume=True), tmp_path / "last")
    assert resumed.model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert not resumed.model[2].weight.is_contiguous()
    torch.testing.assert_close(resumed.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-6)


def test_finished_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = run(PointsTask(), config_of(), tmp_path / "run")
    task = PointsTask()
    with caplog.at_level("INFO"):
        second = run(task, config_of(resume=True), tmp_path / "run")
    assert "this run is finished, all its 2 epochs are done" in caplog.text
    assert task.loader.epochs == []
    assert (second.metrics, second.best_epoch) == (first.metrics, first.best_epoch)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 2


def test_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    run(PointsTask(), config_of(), tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"already holds a run; go on with it by --train\.resume True or use another --run-dir"
    ):
        run(PointsTask(), config_of(), tmp_path / "run")


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"last\.pt is not there, so there is nothing to resume"):
        run(PointsTask(), config_of(resume=True), tmp_path / "run")


def test_a_start_that_is_repeated_goes_on(tmp_path: Path) -> None:
    """With the command line of the first start: without and with a checkpoint, ``resume`` off and on."""
    again = replace(CPU, repeats=True)
    run(PointsTask(), config_of(resume=True), tmp_path / "run", again)
    task = PointsTask()
    run(task, config_of(), tmp_path / "run", again)
    assert task.loader.epochs == []
    with pytest.raises(UserError, match="already holds a run"):
        run(PointsTask(), config_of(), tmp_path / "run")


def test_best_weights_cannot_be_resumed(tmp_path: Path) -> None:
    result = run(PointsTask(), config_of(), tmp_path / "run")
    result.best_path.replace(result.last_path)
    with pytest.raises(ValueError, match="holds weights alone and no state to go on from"):
        run(PointsTask(), config_of(resume=True), tmp_path / "run")


def test_resuming_with_other_settings_names_them(tmp_path: Path) -> None:
    run(PointsTask(), config_of(), tmp_path / "run", data=PointsData(workers=0))
    changed = {"data": PointsData(workers=8, folder="b"), "depth": 2}
    with pytest.raises(ValueError, match="was started with other settings") as error:
        run(PointsTask(), config_of(epochs=4, log_every=9, resume=True), tmp_path / "run", **changed)
    assert "settings: train.epochs 2 -> 4; data.folder 'a' -> 'b'; depth 1 -> 2. Resume" in str(error.value)


def test_a_field_that_the_record_does_not_have_takes_its_default(tmp_path: Path) -> None:
    result = run(PointsTask(), config_of(epochs=1), tmp_path / "run")
    content = load_checkpoint(result.last_path)
    for record in (content["config"], content["training"]["asked"]):
        del record["depth"], record["train"]["accumulate"]
    save_checkpoint(result.last_path, content)
    run(PointsTask(), config_of(epochs=1, resume=True), tmp_path / "run")
    with pytest.raises(ValueError, match="depth 1 -> 2"):
        run(PointsTask(), config_of(epochs=1, resume=True), tmp_path / "run", depth=2)


def test_other_data_are_not_resumed(tmp_path: Path) -> None:
    run(PointsTask(), config_of(), tmp_path / "run")
    other = PointsTask(num_points=9)
    with pytest.raises(ValueError, match=r"last\.pt: this run was trained on other data \(points 8 -> 9; content "):
        run(other, config_of(resume=True), tmp_path / "run")


def test_another_number_of_processes_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run(PointsTask(), config_of(epochs=1), tmp_path / "run")
    content = load_checkpoint(result.last_path)
    content["training"]["world_size"] = 8
    save_checkpoint(result.last_path, content)
    run(PointsTask(), config_of(epochs=1, resume=True), tmp_path / "run")
    assert "this run had 8 processes and goes on with 1" in caplog.text


def test_checkpoint_of_the_layout_before_is_resumed(tmp_path: Path) -> None:
    straight = run(PointsTask(), config_of(epochs=3), tmp_path / "straight")
    stopped = PointsTask()
    stopped.stop_in_evaluation = 3
    with pytest.raises(Killed):
        run(stopped, config_of(epochs=3), tmp_path / "run")
    content = load_checkpoint(tmp_path / "run" / "last.pt")
    for name in ("asked", "data", "world_size", "batch", "readings", "history"):
        del content["training"][name]
    save_checkpoint(tmp_path / "run" / "last.pt", content)
    resumed = run(PointsTask(), config_of(epochs=3, resume=True), tmp_path / "run")
    ours, theirs = load_checkpoint(resumed.last_path), load_checkpoint(straight.last_path)
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "straight")


@pytest.mark.parametrize("left", ["", "\n\n", '{"epoch": 2, "ste', '{"epoch": 2, "ste\n', None])
def test_the_record_is_whole_again_after_a_kill(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, left: str | None
) -> None:
    stopped = PointsTask()
    stopped.stop_in_evaluation = 3
    with pytest.raises(Killed):
        run(stopped, config_of(epochs=3), tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    if left is None:
        path.unlink()
    else:  # killed after last.pt and before or within the line of the second epoch
        path.write_text(f"{first}\n{left}")
    run(PointsTask(), config_of(epochs=3, resume=True), tmp_path / "run")
    lines = path.read_text().splitlines()
    assert lines[:2] == [first, second]
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2, 3]
    if left:
        assert f"{path}: line 2" in caplog.text
        assert "is blank or cut off and is left out" in caplog.text
    assert (
        f"{path}: epoch {'1, 2' if left is None else '2'} is missing and is written from the checkpoint" in caplog.text
    )


def hold_a_run(run_dir: Path, taken: Any, end: Any) -> None:
    with open_run(PointsConfig(run_dir, config_of()), CPU, lambda plain: from_plain(plain, PointsConfig)):
        taken.set()
        end.wait(60)


def test_one_training_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detection.engine.files._ORPHAN_SECONDS", 0.1)
    context = torch.multiprocessing.get_context("spawn")
    taken, end = context.Event(), context.Event()
    process = context.Process(target=hold_a_run, args=(tmp_path / "a" / "run", taken, end))
    process.start()
    try:
        assert taken.wait(60)
        with pytest.raises(ValueError, match=r"run: another training is running in this folder; wait for its end"):
            run(PointsTask(), config_of(), tmp_path / "a" / "run")
        assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == [".lock"]  # nothing was written
    finally:
        end.set()
        process.join(60)
    assert not (tmp_path / "a").exists()  # no training began in it
    run(PointsTask(), config_of(), tmp_path / "a" / "run")


def test_a_start_waits_for_the_workers_of_a_killed_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(PointsTask(), config_of(), tmp_path / "run")
    lock = FileLock(tmp_path / "run" / ".lock", thread_local=False)
    lock.acquire()
    orphans_end = threading.Timer(1, lock.release)
    orphans_end.start()
    run(PointsTask(), config_of(resume=True), tmp_path / "run")
    orphans_end.join()
    assert "run is in use; waiting 30 s at most" in capsys.readouterr().out


_FULL_DISK = """
import resource, sys
from pathlib import Path
from tests.test_trainer import PointsTask, config_of, run
run_dir = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))  # last.pt is larger
run(PointsTask(), config_of(resume=len(sys.argv) > 2), run_dir)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    stopped = PointsTask()
    stopped.stop_in_evaluation = 2
    with pytest.raises(Killed):
        run(stopped, config_of(), tmp_path / "run")
    before = (tmp_path / "run" / "last.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", _FULL_DISK, str(tmp_path / "run"), "resume"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == 1
    told = "OSError: [Errno 27] cannot be written, the file before stays as it was: File too large: "
    (line,) = (line for line in done.stderr.splitlines() if line.startswith(told))  # coverage may say more behind it
    assert ".pt'" in line
    assert (tmp_path / "run" / "last.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob("*.part"))


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3 training images give no batch of 4; lower --train\.batch-size"):
        run(PointsTask(num_points=3), config_of(), tmp_path / "run")


def test_unreadable_images_are_named_once_and_the_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = PointsTask()
    task.loader.skipped = {0: ["a.jpg: does not decode"]}
    run(task, config_of(max_skipped_share=1 / 8), tmp_path / "run")
    named = [record.message for record in caplog.records if "a.jpg" in record.message]
    assert named == ["skipped an image that cannot be read: a.jpg: does not decode"]
    assert "1 unreadable training images were skipped" in caplog.text


def test_too_many_unreadable_images_end_the_run(tmp_path: Path) -> None:
    task = PointsTask()
    task.loader.skipped = {0: [f"{name}.jpg: is not there" for name in "ab"], 1: [f"{name}.jpg: x" for name in "cdefg"]}
    with pytest.raises(ValueError, match="cannot be read") as error:
        run(task, config_of(max_skipped_share=0.25), tmp_path / "run")
    assert str(error.value).startswith(
        "7 of 8 training images cannot be read, more than --train.max-skipped-share 0.25 allows: "
        "a.jpg: is not there; b.jpg: is not there; c.jpg: x; d.jpg: x; e.jpg: x; and 2 more. Repair"
    )


def test_learning_rate_scales_reach_the_optimiser(tmp_path: Path) -> None:
    task = PointsTask(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)))
    task.lr_scales = {"0.": 0.0}
    before = {name: tensor.clone() for name, tensor in task.model.state_dict().items()}
    run(task, config_of(), tmp_path / "run")
    after = task.model.state_dict()
    assert torch.equal(after["0.weight"], before["0.weight"])
    assert not torch.equal(after["1.weight"], before["1.weight"])


def test_weights_outside_of_the_model_are_refused(tmp_path: Path) -> None:
    task = PointsTask()
    task.step.scale = nn.Parameter(torch.ones(()))
    with pytest.raises(AssertionError, match="has weights outside of the model"):
        run(task, config_of(), tmp_path / "run")


class CountHostReads(TorchDispatchMode):
    """Counts what makes the host wait for the device: single values read, and shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.num_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal):
            self.num_reads += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_steps_do_not_wait_for_the_device(tmp_path: Path, amp: Literal["off", "fp16"]) -> None:
    num_reads = []
    for num_points in (8, 32):
        task = deep_task()
        task.loader = Loader(torch.randn(num_points, 3), torch.randn(num_points, 1), 4)
        with CountHostReads() as counter:
            run(task, deep_config(epochs=1, amp=amp, log_every=100), tmp_path / str(num_points))
        num_reads.append(counter.num_reads)
    assert num_reads[0] == num_reads[1]


def test_step_with_a_graph_break_does_not_compile(tmp_path: Path) -> None:
    class Broken(SquaredDistance):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            torch._dynamo.graph_break()
            return super().forward(x, y)

    task = PointsTask()
    task.step = Broken(task.model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(task, config_of(compile=True), tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
def test_compiled_step_trains_the_same(tmp_path: Path) -> None:
    compiled, plain = deep_task(), deep_task()
    compiled.model[3].p = plain.model[3].p = 0.0  # compiled code draws other numbers
    # not AdamW: it makes whole steps of the rounding error that a bias before a batch norm has for a gradient
    result = run(compiled, deep_config(optim=plain_optim(), compile=True), tmp_path / "compiled")
    run(plain, deep_config(optim=plain_optim()), tmp_path / "plain")
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert "0.weight" in load_checkpoint(result.best_path)["weights"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "train.epochs must be at least 1, not 0"),
        ({"batch_size": 0}, "train.batch_size must be at least 1, not 0"),
        (
            {"batch_size": 1},
            "train.batch_size must be at least 2, not 1: batch norm learns nothing from a single image",
        ),
        ({"seed": -1}, "train.seed must be 0 or above, not -1"),
        ({"accumulate": 0}, "train.accumulate must be at least 1, not 0"),
        ({"eval_every": 0}, "train.eval_every must be at least 1, not 0"),
        ({"log_every": 0}, "train.log_every must be at least 1, not 0"),
        ({"num_threads": 0}, "train.num_threads must be at least 1 or None, not 0"),
        ({"max_skipped_share": 1.5}, "train.max_skipped_share must be in 0 <= x <= 1, not 1.5"),
        ({"optim": OptimConfig(lr=-1.0)}, "optim.lr must be above 0"),
        ({"ema": EmaConfig(decay=2.0)}, "ema.decay must be in"),
    ],
)
def test_meaningless_values_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(PointsTask(), config_of(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_batch_is_shared_out_evenly() -> None:
    assert TrainConfig(batch_size=24).batch_size_per_process(8) == 3
    with pytest.raises(
        ValueError, match=r"train\.batch_size 24 cannot be shared out evenly to 5 processes; take a multiple of 5"
    ):
        TrainConfig(batch_size=24).batch_size_per_process(5)


def test_one_image_for_a_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 8 leaves one image for each of 8 processes.*take at least 16"):
        TrainConfig(batch_size=8, sync_norm=False).batch_size_per_process(8)
    assert TrainConfig(batch_size=8).batch_size_per_process(8) == 1


@pytest.mark.parametrize(
    ("share", "num_images", "allowed"),
    [(0.01, 5000, 50), (0.01, 99, 5), (0.01, 12, 2), (0.01, 4, 0), (0.0, 1000, 0), (0.5, 4, 2)],
)
def test_a_few_unreadable_images_end_no_small_training(share: float, num_images: int, allowed: int) -> None:
    assert TrainConfig(max_skipped_share=share).num_skipped_allowed(num_images) == allowed


def fail() -> None:
    raise OSError("the disk is gone")


def train_in_a_process(rank: int, port: int, folder: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with open_runtime("cpu", num_threads=1) as runtime:
        for accumulate in (1, 2):
            task = PointsTask(batch_size=4 // accumulate, runtime=runtime)
            task.loader.skipped = {0: ["a.jpg: seen by process 0"]} if rank == 0 else {}
            if rank == 1:
                with torch.no_grad():
                    task.model.weight.zero_()  # whatever the others begin with, process 0's weights count
            config = config_of(accumulate=accumulate, ema=EmaConfig(horizon_share=0.5), max_skipped_share=0.5)
            run(task, config, folder / f"run {rank} {accumulate}", runtime)
            torch.save(task.model.state_dict(), folder / f"weights {rank} {accumulate}.pt")
        assert runtime.union_over_processes([str(rank)]) == {"0", "1"}

        read = []  # by process 0 alone
        assert from_main(runtime, lambda: read.append(rank) or {"of": rank}) == {"of": 0}
        assert read == ([0] if rank == 0 else [])
        with pytest.raises(OSError if rank == 0 else UserError, match="the disk is gone"):
            from_main(runtime, fail)

        norm = nn.BatchNorm1d(1)
        norm.running_mean.fill_(2.0 + 4.0 * rank)
        runtime.average_buffers(norm)
        assert norm.running_mean.item() == 4.0
    if sys.platform == "linux":  # a thread of Gloo's at work while the interpreter ends would abort the process
        assert "pt_gloo_runloop" not in {file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")}


@pytest.mark.slow
def test_two_processes_with_half_batches_equal_one_with_the_whole(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_in_a_process, (port, tmp_path), nprocs=2)

    alone = PointsTask()
    result = run(alone, config_of(ema=EmaConfig(horizon_share=0.5)), tmp_path / "alone")
    expected = load_checkpoint(result.last_path)
    for accumulate in (1, 2):
        for rank in range(2):
            weights = torch.load(tmp_path / f"weights {rank} {accumulate}.pt")
            torch.testing.assert_close(weights, alone.model.state_dict())
        ours = load_checkpoint(tmp_path / f"run 0 {accumulate}" / "last.pt")
        torch.testing.assert_close(ours["weights"], expected["weights"])
        assert ours["metrics"]["score"] == pytest.approx(result.metrics["score"], rel=1e-5)
        assert losses_of(tmp_path / f"run 0 {accumulate}") == pytest.approx(losses_of(tmp_path / "alone"), rel=1e-5)
        assert not (tmp_path / f"run 1 {accumulate}").exists()  # process 0 alone writes


def test_damaged_images_are_named_once_and_trained_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = PointsTask()
    task.loader.damaged = {0: ["a.jpg: Corrupt JPEG data"], 1: ["b.jpg: Corrupt JPEG data"]}
    run(task, config_of(max_skipped_share=0.0, epochs=2), tmp_path / "run")
    named = [record.getMessage() for record in caplog.records if "damaged image is used" in record.getMessage()]
    assert named == [f"a damaged image is used as it decodes: {name}.jpg: Corrupt JPEG data" for name in "ab"]
    assert "2 damaged training images were used as they decode" in caplog.text
