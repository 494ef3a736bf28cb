"""The training loop. It knows tensors, not what they mean: classification and detection both train with it."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from backbones.errors import UserError
from detection.engine.ema import EmaConfig, ExponentialAverage
from detection.engine.files import Run
from detection.engine.log import Meter, Reading, RunLog, epoch_record, with_wait
from detection.engine.optim import OptimConfig, build_optimizer, build_schedule, parameter_groups
from detection.engine.plain import to_plain
from detection.engine.runtime import Runtime, check_device, seed_everything
from detection.engine.state import TrainState

_log = logging.getLogger(__name__)

_Batch = TypeVar("_Batch", bound="TrainBatch")

_NUM_NAMED_IMAGES = 5  # of the unreadable ones in the message that ends a run
_NUM_SKIPPED_OF_FEW = 5  # unreadable images that end no run, however few images there are (up to a fifth of them)


class TrainBatch(Protocol):
    """A batch of training data.

    Attributes:
        skipped: "path: reason" of every image that could not be read while this batch was made.
        damaged: "path: what the decoder says" of every image in it that decoded to partly wrong pixels.
    """

    skipped: list[str]
    damaged: list[str]

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

    def checkpoint_extra(self) -> dict[str, Any]:
        """Tensors and plain data that travel with the weights: model config, class names, normalisation."""

    def log_images(self, writer: SummaryWriter, step: int, batch: Any, model: nn.Module) -> None:
        """Called on process 0 with a training batch on the device and ``model`` in evaluation mode."""


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 25
    """Passes over the training images."""
    batch_size: int = 24
    """Images of a batch, over all processes together, so that the same recipe fits 1 GPU and 8. Several processes take the
    same steps as one, but their batch norms see their own share of the batch alone (GPUs: sync_norm), so weights differ."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the optimiser."""
    seed: int = 0
    """Everything random follows from it. 0 or above."""
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
    """The run stops when more than this share of the training images cannot be read. In small datasets five images may be
    unreadable, but no more than a fifth of them; with 0 none may."""
    num_threads: int | None = None
    """Threads of torch's operators; None leaves torch's own choice."""
    device: str = "auto"
    """Where to train: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    resume: bool = False
    """Go on with the run in the run folder, exactly where its last whole epoch ended. The network comes from its last.pt
    alone: the weights it once started from are not needed."""

    def validate(self) -> None:
        """Raises UserError for a value that means nothing."""
        for name in ("epochs", "batch_size", "accumulate", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.seed < 0:
            raise UserError(f"train.seed must be 0 or above, not {self.seed}")
        if self.batch_size == 1:
            raise UserError(
                "train.batch_size must be at least 2, not 1: batch norm learns nothing from a single image; to save memory "
                "lower the input size, to average over more images raise --train.accumulate"
            )
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
            UserError: the batch cannot be shared out evenly, or leaves single images.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"train.batch_size {self.batch_size} cannot be shared out evenly to {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        share = self.batch_size // world_size
        if share == 1 and not (self.sync_norm and world_size > 1):
            raise UserError(
                f"train.batch_size {self.batch_size} leaves one image for each of {world_size} processes, and batch norm "
                f"learns nothing from a single image; take at least {2 * world_size}, or on GPUs --train.sync-norm True"
            )
        return share

    def num_skipped_allowed(self, num_images: int) -> int:
        """How many of so many images may be unreadable: see ``max_skipped_share``."""
        if self.max_skipped_share == 0:
            return 0
        return max(int(self.max_skipped_share * num_images), min(_NUM_SKIPPED_OF_FEW, num_images // 5))

    def too_many_skipped(self, texts: Sequence[str], num: int, num_images: int, which: str) -> str:
        """The message that ends a run with too many images that cannot be read.

        Args:
            texts: "path: reason" of some of them.
            num: of all of them.
            num_images: readable ones included.
            which: "training" or "validation".
        """
        named = "; ".join(texts[:_NUM_NAMED_IMAGES])
        more = num - min(len(texts), _NUM_NAMED_IMAGES)
        return (
            f"{num} of {num_images} {which} images cannot be read, more than --train.max-skipped-share "
            f"{self.max_skipped_share:g} allows: {named}{f'; and {more} more' if more else ''}. Repair them, take them out, "
            f"or raise the share"
        )


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


def train(task: Task, config: TrainConfig, run: Run[Any], runtime: Runtime) -> TrainResult:
    """Trains ``task.model`` and leaves a run folder.

    The folder holds ``config.json`` (as adopted), ``metrics.jsonl`` (a line per epoch), ``tensorboard/``, ``last.pt`` (all
    that going on needs, written after every epoch) and ``best.pt`` (deployable weights: the moving average if there is
    one). The host waits for the device when losses are read (``config.log_every``) and at the end of an epoch only.

    Args:
        task: model, data and losses. For a resumed run the model is built from ``run.adopted``; its weights are read here.
        config: how to train; validated here.
        run: the run folder, from ``open_run``.
        runtime: this process, from ``open_runtime``.

    Raises:
        UserError: resuming with other data; too few images for a batch; too many unreadable images.
        OSError: a file of the run cannot be written.
        FloatingPointError: a loss or a weight became infinite or not a number. ``last.pt`` is from the epoch before.
    """
    config.validate()
    start = time.perf_counter()
    loop = _prepare(task, config, run, runtime)
    state = loop.state
    if run.checkpoint is not None:
        run.restore(state)
        _say_where_it_goes_on(state, config, run)
    elif runtime.is_main:
        run.write_config(task.config)

    log = RunLog(run.folder, runtime, config.epochs, config.epochs * loop.steps_per_epoch, state.step, state.history)
    with log:
        while state.epoch < config.epochs:
            epoch_start = time.perf_counter()
            learning_rates, batch = loop.train_epoch(log)
            loop.settle_epoch()
            is_best, evaluates = False, loop.evaluates()
            if evaluates:
                is_best = loop.evaluate(log, batch)
            reading = loop.end_epoch(
                learning_rates, evaluates=evaluates, is_best=is_best, seconds=time.perf_counter() - epoch_start
            )
            log.end_epoch(state.history[-1], reading, shown_metric=task.metric)

    if loop.skipped and runtime.is_main:
        _log.warning("%d unreadable training images were skipped; they are named above", len(loop.skipped))
    if loop.damaged and runtime.is_main:
        _log.warning("%d damaged training images were used as they decode; they are named above", len(loop.damaged))
    return TrainResult(
        metrics=state.metrics,
        best_metric=state.best_metric,
        best_epoch=state.best_epoch,
        best_path=run.best_path,
        last_path=run.last_path,
        seconds=time.perf_counter() - start,
    )


def _prepare(task: Task, config: TrainConfig, run: Run[Any], runtime: Runtime) -> "_Loop":
    """Places the training step on the device and builds the state of a new training."""
    loader = task.train_loader()
    num_batches = len(loader)
    if num_batches == 0:
        raise UserError(
            f"{task.num_train} training images give no batch of {config.batch_size}; lower --train.batch-size"
        )
    num_steps = config.epochs * math.ceil(num_batches / config.accumulate)

    module = _place_step(task.step, config, runtime)
    groups = parameter_groups(task.model, config.optim, task.lr_scales)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in parameters} == {id(p) for p in task.step.parameters() if p.requires_grad}, (
        "the training step has weights outside of the model: they would be neither trained nor saved"
    )
    optimizer = build_optimizer(groups, config.optim)
    state = TrainState(
        model=task.model,
        ema=ExponentialAverage(task.model, config.ema, num_steps) if config.ema.enabled else None,
        optimizer=optimizer,
        schedule=build_schedule(optimizer, config.optim, num_steps),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=config.amp == "fp16"),
        asked=to_plain(run.asked),
        config=to_plain(task.config),
        data=dict(task.data_fingerprint()),
        world_size=runtime.world_size,
    )
    if config.compile:
        task.step.compile(fullgraph=True)  # in place, so the weights keep their names; after the copy for the average
    return _Loop(
        task=task,
        config=config,
        run=run,
        runtime=runtime,
        state=state,
        loader=loader,
        module=module,
        parameters=parameters,
        num_batches=num_batches,
    )


def _say_where_it_goes_on(state: TrainState, config: TrainConfig, run: Run[Any]) -> None:
    if state.epoch == config.epochs:
        _log.info("%s: this run is finished, all its %d epochs are done", run.folder, config.epochs)
    else:
        _log.info("%s: going on after epoch %d of %d", run.folder, state.epoch, config.epochs)


@dataclass(slots=True, kw_only=True)
class _Loop:
    """What stays the same through a training, around the state that changes.

    Attributes:
        module: the training step on its device, wrapped for several processes.
        parameters: what is trained.
        num_batches: of an epoch.
        skipped: images that could not be read so far.
        damaged: images that decoded to partly wrong pixels so far.
    """

    task: Task
    config: TrainConfig
    run: Run[Any]
    runtime: Runtime
    state: TrainState
    loader: TrainLoader
    module: nn.Module
    parameters: list[nn.Parameter]
    num_batches: int
    skipped: set[str] = field(default_factory=set)
    damaged: set[str] = field(default_factory=set)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_batches / self.config.accumulate)

    def train_epoch(self, log: RunLog) -> tuple[dict[str, float], Any]:
        """The steps of an epoch; gives the learning rates of the last one and its batch, on the device."""
        state, config, runtime = self.state, self.config, self.runtime
        seed_everything(config.seed, epoch=state.epoch, rank=runtime.rank)
        _set_epoch(self.loader, state.epoch)
        self.task.step.train()
        log.start_epoch(state.epoch, self.steps_per_epoch)
        meter = Meter(runtime)
        for batch, wait_seconds in with_wait(self.loader):
            self._note_skipped(batch.skipped)
            self._note_damaged(batch.damaged)
            batch = batch.to(runtime.device, non_blocking=True)
            if log.writer is not None and state.step == 0 and state.batch == 0:
                _log_images(self.task, log.writer, state.step, batch, state.model)
                self.task.step.train()
            completes_group = self._forward_and_backward(batch, meter, wait_seconds)
            state.batch += 1
            if not completes_group:
                continue
            learning_rates = self._update(meter)
            log.advance()
            if state.step % config.log_every == 0 or state.batch == self.num_batches:
                self._read(meter, log, learning_rates)
        return learning_rates, batch

    def _forward_and_backward(self, batch: Any, meter: Meter, wait_seconds: float) -> bool:
        """Adds the gradient of a batch; gives whether it is the last one before a step of the optimiser."""
        state, config = self.state, self.config
        # the last group of an epoch may be smaller than the others: each is the mean over its own batches
        group_start = state.batch - state.batch % config.accumulate
        group_size = min(config.accumulate, self.num_batches - group_start)
        completes_group = state.batch + 1 == group_start + group_size
        with _gradients_stay_local(self.module, not completes_group):
            with _autocast(config.amp, self.runtime.device):
                losses = self.module(*batch.inputs())
            state.scaler.scale(losses["loss"] / group_size).backward()
        meter.add(losses, len(batch), wait_seconds)
        return completes_group

    def _update(self, meter: Meter) -> dict[str, float]:
        """A step of the optimiser and all that follows it; gives its learning rates."""
        state, optimizer = self.state, self.state.optimizer
        if self.config.optim.clip_norm is not None:
            state.scaler.unscale_(optimizer)
            meter.add_norm(nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm))
        state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad()
        learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        state.schedule.step()
        if state.ema:
            state.ema.update(state.model)
        state.step += 1
        return learning_rates

    def _read(self, meter: Meter, log: RunLog, learning_rates: dict[str, float]) -> None:
        """Closes a window of losses."""
        reading = meter.read()
        _check_losses(reading, self.state.epoch, self.state.step)
        self.state.readings.append(reading)
        log.window(self.state.epoch, self.state.step, reading, learning_rates)

    def settle_epoch(self) -> None:
        """Brings the processes together after the last step: what cannot be read, what the batch norms saw."""
        _check_weights(self.parameters, self.state.epoch, self.state.step)
        self._note_skipped(self.runtime.union_over_processes(self.skipped))
        self._note_damaged(self.runtime.union_over_processes(self.damaged))
        # DDP sends process 0's before a step; after the last one they differ
        self.runtime.average_buffers(self.state.model)
        if self.state.ema:
            self.runtime.average_buffers(self.state.ema.model)

    def evaluates(self) -> bool:
        """Whether an evaluation follows this epoch."""
        done = self.state.epoch + 1
        return done % self.config.eval_every == 0 or done == self.config.epochs

    def evaluate(self, log: RunLog, batch: Any) -> bool:
        """Evaluates what is deployed; gives whether it is the best so far (on process 0)."""
        state, task = self.state, self.task
        state.metrics = _evaluate(task, state.deployed)
        if log.writer is None:
            return False
        is_best = math.isnan(state.best_metric) or state.metrics[task.metric] > state.best_metric
        if is_best:
            state.best_metric, state.best_epoch = state.metrics[task.metric], state.epoch + 1
        _log_images(task, log.writer, state.step, batch, state.deployed)
        return is_best

    def end_epoch(self, learning_rates: dict[str, float], *, evaluates: bool, is_best: bool, seconds: float) -> Reading:
        """Counts the epoch as done and saves; gives its mean losses."""
        state, run = self.state, self.run
        reading = Reading.mean(state.readings)
        state.epoch, state.batch, state.readings = state.epoch + 1, 0, []
        metrics = state.metrics if evaluates else {}
        state.history.append(
            epoch_record(state.epoch, state.step, reading, learning_rates, metrics, is_best=is_best, seconds=seconds)
        )
        if self.runtime.is_main:
            extra = self.task.checkpoint_extra()
            if is_best:
                state.save_weights(run.best_path, extra)
            state.save(run.last_path, extra)
        return reading

    def _note_damaged(self, damaged: Iterable[str]) -> None:
        """Names each damaged image once; it is trained on as it decodes."""
        for text in sorted(set(damaged) - self.damaged):
            _log.warning("a damaged image is used as it decodes: %s", text)
            self.damaged.add(text)

    def _note_skipped(self, skipped: Iterable[str]) -> None:
        """Names each unreadable image once; ends the run when there are too many."""
        for text in sorted(set(skipped) - self.skipped):
            _log.warning("skipped an image that cannot be read: %s", text)
            self.skipped.add(text)
        num, total = len(self.skipped), self.task.num_train
        if num > self.config.num_skipped_allowed(total):
            raise UserError(self.config.too_many_skipped(sorted(self.skipped), num, total, "training"))


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
