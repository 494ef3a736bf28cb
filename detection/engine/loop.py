"""The training loop. It knows tensors, not what they mean: classification and detection both train with it."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from backbones.errors import UserError
from backbones.state import load_state
from detection.engine.checkpoint import load_checkpoint, save_checkpoint
from detection.engine.ema import EmaConfig, ExponentialAverage
from detection.engine.log import Meter, Reading, RunLog, with_wait
from detection.engine.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups
from detection.engine.runtime import Runtime, check_device, seed_everything

_log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch", bound="TrainBatch")

# Settings that may differ when a run is resumed: they change where and how fast it runs, not what it computes.
_FREE_ON_RESUME = frozenset({"resume", "device", "num_threads", "workers", "log_every", "run_dir"})

_NUM_NAMED_IMAGES = 5  # of the unreadable ones in the message that ends a run


class TrainBatch(Protocol):
    """A batch of training data.

    Attributes:
        skipped: "path: reason" of every image that could not be read while this batch was made.
    """

    skipped: list[str]

    def __len__(self) -> int:
        """Number of images."""

    def inputs(self) -> tuple[Tensor, ...]:
        """What the training step takes."""

    def to(self: _Batch, device: torch.device, non_blocking: bool = False) -> _Batch:
        """The same batch on another device."""


class TrainLoader(Protocol):
    """A ``DataLoader``. Where it, its batch sampler or its sampler has ``set_epoch``, each epoch begins with it.

    With several processes each one's loader gives its own share, and all of them the same number of batches.
    """

    def __len__(self) -> int:
        """Number of batches of an epoch."""

    def __iter__(self) -> Iterator[Any]:
        """The batches (``TrainBatch``) of an epoch."""


class Task(Protocol):
    """What is trained. The properties may as well be plain attributes."""

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

    def train_loader(self) -> TrainLoader:
        """The training data. Called once."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Called on every process with ``model`` in evaluation mode; process 0's result counts."""

    def checkpoint_extra(self) -> dict[str, Any]:
        """Tensors and plain data that travel with the weights: model config, class names, normalisation."""

    def log_images(self, writer: SummaryWriter, step: int, batch: Any, model: nn.Module) -> None:
        """Called on process 0 with a training batch on the device and ``model`` in evaluation mode."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 25
    """Passes over the training images."""
    batch_size: int = 24
    """Images of a batch, over all processes together: the same recipe trains the same on 1 GPU and on 8."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the optimiser."""
    seed: int = 0
    """Everything random follows from it."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of the forward pass. fp16 scales the loss and leaves out steps whose gradient overflows."""
    channels_last: bool = True
    """Memory format of the convolutions' weights; more than twice as fast on a CPU."""
    compile: bool = False
    """Compile the training step with torch.compile(fullgraph=True)."""
    sync_norm: bool = False
    """Batch norms see the images of all processes (GPUs only; without effect in one process)."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 20
    """Optimiser steps between readings of the losses. A reading makes the host wait for the device."""
    max_skipped_share: float = 0.01
    """The run stops when more than this share of the training images cannot be read."""
    num_threads: int | None = None
    """Threads of torch's operators; None leaves torch's own choice."""
    device: str = "auto"
    """Where to train: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    resume: bool = False
    """Go on with the run in the run folder, exactly where its last whole epoch ended."""

    def validate(self) -> None:
        """Raises UserError for a value that means nothing."""
        for name in ("epochs", "batch_size", "accumulate", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"train.num_threads must be at least 1 or None, not {self.num_threads}")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"train.max_skipped_share must be in 0 <= x <= 1, not {self.max_skipped_share}")
        check_device(self.device)
        self.optim.validate()
        self.ema.validate()

    def batch_size_per_process(self, world_size: int) -> int:
        """Images of a batch in one of ``world_size`` processes.

        Raises:
            UserError: the batch cannot be shared out evenly.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"train.batch_size {self.batch_size} cannot be shared out evenly to {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        return self.batch_size // world_size


@dataclass(kw_only=True, slots=True)
class TrainResult:
    """What a training ended with (on process 0; the others know paths and seconds alone).

    Attributes:
        metrics: the last evaluation.
        best_metric: the best value of the task's metric, reached in epoch ``best_epoch`` (1 is the first).
        best_path: the deployable weights with what travels with them.
        last_path: the same of the last epoch, with the state for going on.
        seconds: how long this start of the run took.
    """

    metrics: dict[str, float]
    best_metric: float
    best_epoch: int
    best_path: Path
    last_path: Path
    seconds: float


def train(
    task: Task, config: TrainConfig, run_dir: Path, runtime: Runtime, config_record: Mapping[str, Any]
) -> TrainResult:
    """Trains ``task.model`` and leaves a run folder.

    The folder holds ``config.json``, ``metrics.jsonl`` (a line per epoch), ``tensorboard/``, ``last.pt`` (all that
    going on needs, written after every epoch) and ``best.pt`` (deployable weights: the moving average if there is one).
    The host waits for the device when losses are read (``config.log_every``) and at the end of an epoch only.

    Args:
        task: model, data and losses.
        config: how to train; validated here.
        run_dir: folder of the run, made if it is not there.
        runtime: this process, from ``open_runtime``.
        config_record: the whole configuration as plain data, for the record and for the check when resuming.

    Raises:
        UserError: the folder holds a run and ``resume`` is off; resuming with other settings; too few images for a
            batch; too many unreadable images.
        FileNotFoundError: nothing to resume.
        FloatingPointError: a loss or a weight became infinite or not a number. ``last.pt`` is from the epoch before.
    """
    config.validate()
    start = time.perf_counter()
    device, model = runtime.device, task.model
    best_path, last_path = run_dir / "best.pt", run_dir / "last.pt"
    config_record = json.loads(json.dumps(config_record, default=str))
    resumed = _open_run_folder(run_dir, config.resume, config_record, runtime)

    loader = task.train_loader()
    num_batches = len(loader)
    if num_batches == 0:
        raise UserError(
            f"{task.num_train} training images give no batch of {config.batch_size}; lower --train.batch-size"
        )
    steps_per_epoch = math.ceil(num_batches / config.accumulate)
    num_steps = config.epochs * steps_per_epoch

    step_module = _place_step(task.step, config, runtime)
    groups = parameter_groups(model, config.optim, task.lr_scales)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in task.step.parameters() if p.requires_grad}, (
        "the training step has weights outside of the model: they would be neither trained nor saved"
    )
    optimizer = build_optimizer(groups, config.optim)
    schedule = build_schedule(optimizer, config.optim, num_steps)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    ema = ExponentialAverage(model, config.ema, num_steps) if config.ema.enabled else None
    deployed = ema.model if ema else model
    if config.compile:
        task.step.compile(fullgraph=True)  # in place, so the weights keep their names; after the copy for the average

    first_epoch, step = 0, 0
    metrics: dict[str, float] = {}
    best_metric, best_epoch = math.nan, 0
    if resumed is not None:
        state = resumed["training"]
        load_state(model, state["model"], str(last_path))
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        scaler.load_state_dict(state["scaler"])
        if ema:
            ema.load_state_dict(state["ema"])
        first_epoch, step, metrics = resumed["epoch"], resumed["step"], resumed["metrics"]
        best_metric, best_epoch = state["best_metric"], state["best_epoch"]
        if first_epoch == config.epochs:
            _log.info("%s: this run is finished, all its %d epochs are done", run_dir, config.epochs)
        else:
            _log.info("%s: going on after epoch %d of %d", run_dir, first_epoch, config.epochs)

    skipped: set[str] = set()
    with RunLog(run_dir, runtime, config.epochs, first_epoch, step, num_steps) as run_log:
        for epoch in range(first_epoch, config.epochs):
            epoch_start = time.perf_counter()
            seed_everything(config.seed, epoch=epoch, rank=runtime.rank)
            _set_epoch(loader, epoch)
            task.step.train()
            run_log.start_epoch(epoch, steps_per_epoch)
            meter, readings = Meter(runtime), []

            for i, (batch, wait_seconds) in enumerate(with_wait(loader)):
                _note_skipped(skipped, batch.skipped, config.max_skipped_share, task.num_train)
                batch = batch.to(device, non_blocking=True)
                if run_log.writer is not None and step == 0 and i == 0:
                    _log_images(task, run_log.writer, step, batch, model)
                    task.step.train()

                # the last group of an epoch may be smaller than the others: each is the mean over its own batches
                group_start = i - i % config.accumulate
                group_size = min(config.accumulate, num_batches - group_start)
                completes_group = i + 1 == group_start + group_size
                with _gradients_stay_local(step_module, not completes_group):
                    with _autocast(config.amp, device):
                        losses = step_module(*batch.inputs())
                    scaler.scale(losses["loss"] / group_size).backward()
                meter.add(losses, len(batch), wait_seconds)
                if not completes_group:
                    continue

                if config.optim.clip_norm is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(parameters, config.optim.clip_norm)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
                schedule.step()
                if ema:
                    ema.update(model)
                step += 1
                run_log.advance()

                if step % config.log_every == 0 or i + 1 == num_batches:
                    readings.append(meter.read())
                    _check_losses(readings[-1], epoch, step)
                    run_log.window(epoch, step, readings[-1], learning_rates)

            _check_weights(parameters, epoch, step)
            _note_skipped(skipped, runtime.union_over_processes(skipped), config.max_skipped_share, task.num_train)
            runtime.average_buffers(model)  # DDP sends process 0's before a step; after the last one they differ
            if ema:
                runtime.average_buffers(ema.model)

            evaluates = (epoch + 1) % config.eval_every == 0 or epoch + 1 == config.epochs
            is_best = False
            if evaluates:
                metrics = _evaluate(task, deployed)
                if run_log.writer is not None:
                    is_best = math.isnan(best_metric) or metrics[task.metric] > best_metric
                    if is_best:
                        best_metric, best_epoch = metrics[task.metric], epoch + 1
                    _log_images(task, run_log.writer, step, batch, deployed)

            if runtime.is_main:
                content = {
                    "weights": deployed.state_dict(),
                    "extra": task.checkpoint_extra(),
                    "epoch": epoch + 1,
                    "step": step,
                    "metrics": metrics,
                    "config": config_record,
                }
                if is_best:
                    save_checkpoint(best_path, content)
                training = {
                    "model": model.state_dict(),
                    "ema": ema.state_dict() if ema else None,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "scaler": scaler.state_dict(),
                    "best_metric": best_metric,
                    "best_epoch": best_epoch,
                }
                save_checkpoint(last_path, content | {"training": training})
            run_log.end_epoch(
                epoch,
                step,
                Reading.mean(readings),
                learning_rates,
                metrics if evaluates else {},
                shown_metric=task.metric,
                is_best=is_best,
                seconds=time.perf_counter() - epoch_start,
            )

    if skipped and runtime.is_main:
        _log.warning("%d unreadable training images were skipped; they are named above", len(skipped))
    return TrainResult(
        metrics=metrics,
        best_metric=best_metric,
        best_epoch=best_epoch,
        best_path=best_path,
        last_path=last_path,
        seconds=time.perf_counter() - start,
    )


def _open_run_folder(
    run_dir: Path, resume: bool, config_record: Mapping[str, Any], runtime: Runtime
) -> dict[str, Any] | None:
    """The checkpoint to go on from, or None and a folder for a new run with its ``config.json``."""
    last_path = run_dir / "last.pt"
    if not resume:
        if last_path.exists():
            raise UserError(
                f"{run_dir} already holds a run; go on with it by --train.resume True or use another --run-dir"
            )
        if runtime.is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.json").write_text(json.dumps(config_record, indent=2) + "\n")
        return None

    if not last_path.exists():
        raise FileNotFoundError(
            f"{last_path} is not there, so there is nothing to resume; start without --train.resume"
        )
    checkpoint = load_checkpoint(last_path)
    if "training" not in checkpoint:
        raise UserError(f"{last_path} holds weights alone and no state to go on from; is it a copy of a best.pt?")
    differences = [
        f"{name} {was!r} -> {now!r}"
        for name, was, now in _compare(checkpoint["config"], config_record)
        if name.rpartition(".")[2] not in _FREE_ON_RESUME
    ]
    if differences:
        raise UserError(
            f"{run_dir} was started with other settings: {'; '.join(differences)}. "
            f"Resume with the same ones, or start a new run in another --run-dir"
        )
    return checkpoint


def _compare(was: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name and both values of every leaf in which two nested dicts differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key in [*was, *(key for key in now if key not in was)]:
            yield from _compare(was.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif was != now:
        yield name, was, now


def _place_step(step: nn.Module, config: TrainConfig, runtime: Runtime) -> nn.Module:
    """Moves the training step to the device and, for several processes, wraps it."""
    if config.sync_norm and runtime.world_size > 1:
        if runtime.device.type != "cuda":
            raise UserError("train.sync_norm works on GPUs alone; leave it off for several processes on a CPU")
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)
    step.to(runtime.device)
    if config.channels_last:
        step.to(memory_format=torch.channels_last)
    if runtime.world_size == 1:
        return step
    return DistributedDataParallel(step, device_ids=[runtime.device] if runtime.device.type == "cuda" else None)


def _set_epoch(loader: TrainLoader, epoch: int) -> None:
    """Tells the sampler which epoch begins. A loader without ``set_epoch`` draws its order from the global seed."""
    for part in (loader, getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)):
        set_epoch = getattr(part, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
            return


def _autocast(amp: Literal["off", "bf16", "fp16"], device: torch.device) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def _gradients_stay_local(step: nn.Module, condition: bool) -> contextlib.AbstractContextManager[None]:
    """Without the exchange of gradients between processes, for the batches before the last of a group."""
    if condition and isinstance(step, DistributedDataParallel):
        return step.no_sync()
    return contextlib.nullcontext()


def _note_skipped(seen: set[str], skipped: Iterable[str], max_share: float, num_train: int) -> None:
    """Names each unreadable image once and adds it to ``seen``; ends the run when there are too many."""
    for text in sorted(set(skipped) - seen):
        _log.warning("skipped an image that cannot be read: %s", text)
        seen.add(text)
    if len(seen) > max_share * num_train:
        named = "; ".join(sorted(seen)[:_NUM_NAMED_IMAGES])
        more = f"; and {len(seen) - _NUM_NAMED_IMAGES} more" if len(seen) > _NUM_NAMED_IMAGES else ""
        raise UserError(
            f"{len(seen)} of {num_train} training images cannot be read, more than --train.max-skipped-share "
            f"{max_share:g} allows: {named}{more}. Repair them, take them out, or raise the share"
        )


def _check_losses(reading: Reading, epoch: int, step: int) -> None:
    broken = [name for name, value in reading.losses.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(
            f"the loss is no longer finite ({', '.join(broken)}) in epoch {epoch + 1}, in the "
            f"{reading.num_batches} batches up to step {step}; lower --train.optim.lr, set --train.optim.clip-norm, or "
            f"look at the data. The checkpoint of the epoch before is kept"
        )


def _check_weights(parameters: list[nn.Parameter], epoch: int, step: int) -> None:
    """The last loss was taken before the last step: a checkpoint must not keep what that step broke."""
    if not nn.utils.get_total_norm([parameter.detach() for parameter in parameters]).isfinite():
        raise FloatingPointError(
            f"the weights are no longer finite at the end of epoch {epoch + 1}, after step {step}; lower "
            f"--train.optim.lr or set --train.optim.clip-norm. The checkpoint of the epoch before is kept"
        )


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    return {name: float(value) for name, value in task.evaluate(model).items()}


@torch.no_grad()
def _log_images(task: Task, writer: SummaryWriter, step: int, batch: TrainBatch, model: nn.Module) -> None:
    model.eval()
    task.log_images(writer, step, batch, model)
