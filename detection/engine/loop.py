"""The training loop. It knows tensors, not what they mean: classification and detection both train with it."""

import contextlib
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter

from backbones.errors import UserError
from detection.engine.config import TrainConfig
from detection.engine.ema import ExponentialAverage
from detection.engine.files import Run
from detection.engine.log import Meter, Reading, RunLog, epoch_record, with_wait
from detection.engine.memory import memory_advice
from detection.engine.nonfinite import NonFiniteGuard
from detection.engine.optim import build_optimizer, build_schedule, parameter_groups
from detection.engine.plain import to_plain
from detection.engine.runtime import Runtime, seed_everything
from detection.engine.state import TrainState
from detection.engine.stopping import StopRequest
from detection.engine.sync_norm import synchronise_norms
from detection.engine.task import Task, TrainBatch, TrainLoader

_log = logging.getLogger(__name__)


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
    that going on needs, written after every epoch and within it as often as the config says) and ``best.pt`` (deployable
    weights: the moving average if there is one). SIGINT, SIGTERM and SIGHUP end the step that it is in, write ``last.pt``
    and raise. The host waits for the device when losses are read (``config.log_every``), for a checkpoint and at the end of
    an epoch only.

    Args:
        task: model, data and losses. For a resumed run the model is built from ``run.adopted``; its weights are read here.
        config: how to train; validated here.
        run: the run folder, from ``open_run``.
        runtime: this process, from ``open_runtime``.

    Raises:
        UserError: resuming with other data; too few images for a batch; too many unreadable images.
        OSError: a file of the run cannot be written.
        KeyboardInterrupt: a signal asked for an end; ``Terminated`` for any but SIGINT.
        FloatingPointError: too many losses or gradients, or a weight, became infinite or not a number. ``last.pt`` stays as
            it was.
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

    num_steps = config.epochs * loop.steps_per_epoch
    waits_for_evaluation = state.batch == loop.num_batches
    # A checkpoint comes after what is logged of its step, but for an evaluation that follows it: to log that once, all of
    # this step is logged again.
    purge_step = state.step + 1 if state.step and not waits_for_evaluation else state.step
    with (
        loop.stop,
        RunLog(run.folder, runtime, config.epochs, num_steps, state.step, state.history, purge_step) as log,
    ):
        while state.epoch < config.epochs:
            batch = loop.train_epoch(log)
            loop.settle_epoch()
            is_best, evaluates = False, loop.evaluates()
            if evaluates:
                is_best = loop.evaluate(log, batch)
            reading = loop.end_epoch(evaluates=evaluates, is_best=is_best)
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
        guard=NonFiniteGuard(runtime, task.model, task.image_names),
    )


def _say_where_it_goes_on(state: TrainState, config: TrainConfig, run: Run[Any]) -> None:
    if state.epoch == config.epochs:
        _log.info("%s: this run is finished, all its %d epochs are done", run.folder, config.epochs)
    elif state.batch:
        _log.info(
            "%s: going on after batch %d of epoch %d of %d", run.folder, state.batch, state.epoch + 1, config.epochs
        )
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
        stop: whether a signal asks for an end.
        guard: leaves out steps whose loss or gradient is not finite.
        epoch_start: when this start of the run began with the unfinished epoch, by ``time.perf_counter``.
        saved_at: when the last checkpoint was written, likewise.
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
    stop: StopRequest = field(default_factory=StopRequest)
    guard: NonFiniteGuard
    epoch_start: float = field(default_factory=time.perf_counter)
    saved_at: float = field(default_factory=time.perf_counter)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_batches / self.config.accumulate)

    def train_epoch(self, log: RunLog) -> Any:
        """The steps of an epoch that are left; gives the last batch, on the device, or None where no step was left."""
        state, config, runtime = self.state, self.config, self.runtime
        self.epoch_start = time.perf_counter()
        log.start_epoch(state.epoch, self.steps_per_epoch, math.ceil(state.batch / config.accumulate))
        if state.batch == self.num_batches:  # stopped after the last step, and its window is purged
            log.window(state.epoch, state.step, state.readings[-1], state.learning_rates)
            return None
        self.loader.set_epoch(state.epoch, state.batch)
        self.task.step.train()
        meter = Meter(runtime)
        if state.window is not None:
            meter.load_state(state.window)
            state.window = None
        for batch, wait_seconds in with_wait(self.loader):
            self._note_skipped(batch.skipped)
            self._note_damaged(batch.damaged)
            image_ids = batch.image_ids.tolist()
            batch = batch.to(runtime.device, non_blocking=True)
            if log.writer is not None and state.step == 0 and state.batch == 0:
                with memory_advice(config):
                    _log_images(self.task, log.writer, state.step, batch, state.model)
                self.task.step.train()
            seed_everything(config.seed, epoch=state.epoch, rank=runtime.rank, batch=state.batch)
            completes_group = self._forward_and_backward(batch, image_ids, meter, wait_seconds)
            state.batch += 1
            if not completes_group:
                continue
            self._update(meter)
            log.advance()
            if state.step % config.log_every == 0 or state.batch == self.num_batches:
                self._read(meter, log)
            self._save_if_due(meter, log)
        return batch

    def _forward_and_backward(self, batch: Any, image_ids: list[int], meter: Meter, wait_seconds: float) -> bool:
        """Adds the gradient of a batch; gives whether it is the last one before a step of the optimiser."""
        state, config = self.state, self.config
        # the last group of an epoch may be smaller than the others: each is the mean over its own batches
        group_start = state.batch - state.batch % config.accumulate
        group_size = min(config.accumulate, self.num_batches - group_start)
        completes_group = state.batch + 1 == group_start + group_size
        if state.batch == group_start:
            self.guard.begin_step()
        with memory_advice(config), _gradients_stay_local(self.module, not completes_group):
            with _autocast(config.amp, self.runtime.device):
                losses = self.module(*batch.inputs())
            state.scaler.scale(losses["loss"] / group_size).backward()
        self.guard.add(losses["loss"], image_ids)
        meter.add(losses, len(batch), wait_seconds)
        return completes_group

    def _update(self, meter: Meter) -> None:
        """A step of the optimiser and all that follows it."""
        state, optimizer = self.state, self.state.optimizer
        if self.config.optim.clip_norm is not None:
            state.scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip_norm)
            meter.add_norm(norm)
        elif not state.scaler.is_enabled():
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None], foreach=True)
            meter.add_norm(norm)
        if state.scaler.is_enabled():
            self.guard.end_step(None)
        else:  # the fused optimisers leave out a step by this flag, which GradScaler sets itself
            optimizer.found_inf = self.guard.end_step(norm).float()  # type: ignore[attr-defined]
        with memory_advice(self.config):  # the first step makes the optimiser's state
            state.scaler.step(optimizer)
        state.scaler.update()
        optimizer.zero_grad()
        state.learning_rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
        state.schedule.step()
        if state.ema:
            state.ema.update(state.model)
        state.step += 1

    def _read(self, meter: Meter, log: RunLog) -> None:
        """Closes a window of losses."""
        self._report_left_out()
        reading = meter.read()
        self.state.readings.append(reading)
        log.window(self.state.epoch, self.state.step, reading, self.state.learning_rates)

    def _report_left_out(self) -> None:
        """Names and counts the batches that were left out; ends the run when there are too many."""
        state, limit = self.state, self.config.max_left_out
        state.num_left_out += self.guard.report()
        if state.num_left_out > limit:
            raise FloatingPointError(
                f"{state.num_left_out} batches of this run had a loss or gradient that is infinite or not a number and were "
                f"left out, more than --train.max-left-out {limit}; this is epoch {state.epoch + 1}, step {state.step}. "
                f"Lower --train.optim.lr, set --train.optim.clip-norm, or look at the images that are named above. The last "
                f"checkpoint is kept"
            )

    def _save_if_due(self, meter: Meter, log: RunLog) -> None:
        """Writes a checkpoint within the epoch where the config or a signal asks for one; ends the run for a signal."""
        state, config = self.state, self.config
        num_steps, minutes = config.checkpoint_every_steps, config.checkpoint_every_minutes
        is_due = num_steps is not None and state.step % num_steps == 0
        is_due |= minutes is not None and time.perf_counter() - self.saved_at >= 60 * minutes
        is_due, stops = self.runtime.any_over_processes(is_due, self.stop.number is not None)
        if not (is_due or stops):
            return
        _check_weights(self.parameters, state.epoch, state.step)
        self._report_left_out()
        state.window = meter.state()
        log.flush()
        self._save()
        if stops:
            self._say_where_it_stopped()
            raise self.stop.error()

    def _save(self) -> None:
        """Writes ``last.pt`` (process 0)."""
        state, before = self.state, self.state.seconds
        if self.runtime.is_main:
            state.seconds = before + time.perf_counter() - self.epoch_start
            state.save(self.run.last_path, self.task.checkpoint_extra())
            state.seconds = before
        self.saved_at = time.perf_counter()

    def _say_where_it_stopped(self) -> None:
        _log.info("%s: stopped in epoch %d after step %d", self.run.last_path, self.state.epoch + 1, self.state.step)

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
        try:
            with self.stop.at_once(), memory_advice(self.config, evaluates=True):
                metrics = _evaluate(task, state.deployed)
        except KeyboardInterrupt:
            log.flush()
            self._save()
            self._say_where_it_stopped()
            raise
        state.metrics = metrics
        if log.writer is None:
            return False
        is_best = math.isnan(state.best_metric) or state.metrics[task.metric] > state.best_metric
        if is_best:
            state.best_metric, state.best_epoch = state.metrics[task.metric], state.epoch + 1
        if batch is not None:
            _log_images(task, log.writer, state.step, batch, state.deployed)
        log.evaluation(state.metrics, state.step)
        return is_best

    def end_epoch(self, *, evaluates: bool, is_best: bool) -> Reading:
        """Counts the epoch as done and saves; gives its mean losses."""
        state = self.state
        reading = Reading.mean(state.readings)
        seconds = state.seconds + time.perf_counter() - self.epoch_start
        state.epoch, state.batch, state.readings, state.window, state.seconds = state.epoch + 1, 0, [], None, 0.0
        metrics = state.metrics if evaluates else {}
        record = epoch_record(
            state.epoch, state.step, reading, state.learning_rates, metrics, is_best=is_best, seconds=seconds
        )
        state.history.append(record)
        if is_best:  # on process 0 alone
            state.save_weights(self.run.best_path, self.task.checkpoint_extra())
        self.epoch_start = time.perf_counter()
        self._save()
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
        step = synchronise_norms(step, runtime.device, compiled=config.compile)
    step.to(runtime.device)
    if config.channels_last:
        step.to(memory_format=torch.channels_last)
    if runtime.world_size == 1:
        return step
    return DistributedDataParallel(step, device_ids=[runtime.device] if runtime.device.type == "cuda" else None)


def _autocast(amp: Literal["off", "bf16", "fp16"], device: torch.device) -> torch.autocast:
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=amp != "off")


def _gradients_stay_local(step: nn.Module, condition: bool) -> contextlib.AbstractContextManager[None]:
    """Without the exchange of gradients between processes, for the batches before the last of a group."""
    if condition and isinstance(step, DistributedDataParallel):
        return step.no_sync()
    return contextlib.nullcontext()


def _check_weights(parameters: list[nn.Parameter], epoch: int, step: int) -> None:
    """The last loss was taken before the last step: a checkpoint must not keep what that step broke."""
    if not nn.utils.get_total_norm([parameter.detach() for parameter in parameters]).isfinite():
        raise FloatingPointError(
            f"the weights are no longer finite in epoch {epoch + 1}, after step {step}; lower "
            f"--train.optim.lr or set --train.optim.clip-norm. The last checkpoint is kept"
        )


@torch.no_grad()
def _evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    return {name: float(value) for name, value in task.evaluate(model).items()}


@torch.no_grad()
def _log_images(task: Task, writer: SummaryWriter, step: int, batch: TrainBatch, model: nn.Module) -> None:
    model.eval()
    task.log_images(writer, step, batch, model)
