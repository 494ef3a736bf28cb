"""What a training tells: a bar or lines for the person, metrics.jsonl and TensorBoard for the record."""

import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm.contrib.logging import logging_redirect_tqdm

from backbones.state import write_whole
from detection.engine import progress
from detection.engine.runtime import Runtime

_log = logging.getLogger(__name__)

_Item = TypeVar("_Item")


def with_wait(items: Iterable[_Item]) -> Iterator[tuple[_Item, float]]:
    """Each item with the seconds that it was waited for."""
    iterator = iter(items)
    while True:
        start = time.perf_counter()
        try:
            item = next(iterator)
        except StopIteration:
            return
        yield item, time.perf_counter() - start


@dataclass(slots=True, kw_only=True)
class Reading:
    """Means over the batches of a window (or an epoch) and over all processes.

    Attributes:
        losses: mean of each loss over the batches that have finite ones; 0 where none has.
        num_batches: batches of one process that have finite losses.
        num_images: images of all processes.
        seconds: how long the window took.
        wait_seconds: how much of it this process waited for data.
        gradient_norm: mean L2 norm before clipping over the window's steps; None in fp16 without clipping.
    """

    losses: dict[str, float]
    num_batches: float
    num_images: int
    seconds: float
    wait_seconds: float
    gradient_norm: float | None = None

    def to_plain(self) -> dict[str, Any]:
        """The fields, fit for a checkpoint."""
        return asdict(self)

    @property
    def images_per_second(self) -> float:
        return self.num_images / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        return self.wait_seconds / max(self.seconds, 1e-9)

    @staticmethod
    def mean(readings: "list[Reading]") -> "Reading":
        """Several windows as one."""
        num_batches = sum(reading.num_batches for reading in readings)
        norms = [reading.gradient_norm for reading in readings if reading.gradient_norm is not None]
        return Reading(
            losses={
                name: sum(reading.losses[name] * reading.num_batches for reading in readings) / max(num_batches, 1)
                for name in readings[0].losses
            },
            num_batches=num_batches,
            num_images=sum(reading.num_images for reading in readings),
            seconds=sum(reading.seconds for reading in readings),
            wait_seconds=sum(reading.wait_seconds for reading in readings),
            gradient_norm=sum(norms) / len(norms) if norms else None,
        )


class Meter:
    """Sums losses on the device; the host waits for the device when ``read`` is called and at no other time."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._names: list[str] = []
        self._sums: Tensor | None = None
        self._norms: Tensor | None = None  # [2]: sum and number of the finite gradient norms
        self._num_images = 0
        self._wait_seconds = 0.0
        self._start = time.perf_counter()

    def add(self, losses: dict[str, Tensor], num_images: int, wait_seconds: float) -> None:
        """Takes in the losses (scalars on the device) of one batch."""
        self._names = list(losses)
        values = torch.stack(
            [*(loss.detach().float() for loss in losses.values()), losses["loss"].new_ones(()).float()]
        )
        values = torch.where(values.isfinite().all(), values, 0.0)
        self._sums = values if self._sums is None else self._sums + values
        self._num_images += num_images
        self._wait_seconds += wait_seconds

    def add_norm(self, norm: Tensor) -> None:
        """Takes in the gradient norm (a scalar on the device) of one step; one that is not finite does not count."""
        finite = norm.detach().isfinite()
        pair = torch.stack([torch.where(finite, norm.detach(), 0), finite]).float()
        self._norms = pair if self._norms is None else self._norms + pair

    def state(self) -> dict[str, Any] | None:
        """What is summed since the last reading, over all processes, fit for a checkpoint; None for nothing.

        Every process has to call it after the same number of batches.
        """
        if self._sums is None:
            return None
        sums = self._runtime.sum_over_processes(self._sums.clone()) / self._runtime.world_size
        return {
            "names": self._names,
            "sums": sums.cpu(),
            "norms": None if self._norms is None else self._norms.cpu(),  # the same in all processes
            "num_images": self._num_images * self._runtime.world_size,
            "seconds": time.perf_counter() - self._start,
            "wait_seconds": self._wait_seconds,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from what ``state`` gave, of any number of processes."""
        world_size = self._runtime.world_size
        share = world_size if self._runtime.is_main else 0  # the sum is there once, whoever holds it
        self._names = list(state["names"])
        self._sums = state["sums"].to(self._runtime.device) * share
        self._norms = None if state["norms"] is None else state["norms"].to(self._runtime.device)
        self._num_images = state["num_images"] // world_size
        self._wait_seconds = state["wait_seconds"]
        self._start = time.perf_counter() - state["seconds"]

    def read(self) -> Reading:
        """The means since the last reading. Every process has to call it after the same number of batches."""
        assert self._sums is not None, "read() before add()"
        values = self._sums if self._norms is None else torch.cat([self._sums, self._norms.to(self._sums)])
        sums = self._runtime.sum_over_processes(values).tolist()
        norm = None
        if self._norms is not None:
            number, norm = sums.pop(), sums.pop()
            norm = norm / number if number else None
        now = time.perf_counter()
        *sums, count = sums
        reading = Reading(
            losses={name: value / max(count, 1) for name, value in zip(self._names, sums, strict=True)},
            num_batches=count / self._runtime.world_size,
            num_images=self._num_images * self._runtime.world_size,
            seconds=now - self._start,
            wait_seconds=self._wait_seconds,
            gradient_norm=norm,
        )
        self._sums, self._norms, self._num_images, self._wait_seconds, self._start = None, None, 0, 0.0, now
        return reading


@dataclass(slots=True)
class RunLog:
    """The record of a run in its folder, written by process 0 alone; on the others every call does nothing.

    ``metrics.jsonl`` has a line per epoch, ``tensorboard/`` the curves and images. Used as a context manager.

    Attributes:
        run_dir: folder of the run, already there.
        runtime: this process.
        num_epochs: epochs of the whole training.
        num_steps: optimiser steps of the whole training.
        first_step: optimiser steps that were done before this start.
        purge_step: TensorBoard forgets what a start before this one wrote of this step and later ones.
        history: the records of the epochs before, from the checkpoint. ``metrics.jsonl`` begins with them, whatever a run
            that was killed left in it.
    """

    run_dir: Path
    runtime: Runtime
    num_epochs: int
    num_steps: int
    first_step: int = 0
    history: Sequence[Mapping[str, Any]] = ()
    purge_step: int = 0
    writer: SummaryWriter | None = field(default=None, init=False)
    _bar: Any | None = field(default=None, init=False)
    _stack: ExitStack = field(default_factory=ExitStack, init=False)
    _start: float = field(default_factory=time.perf_counter, init=False)
    _last_line: float = field(default_factory=time.perf_counter, init=False)

    def __enter__(self) -> "RunLog":
        if self.runtime.is_main:
            if self.history:
                self._say_what_is_mended()
            lines = "".join(json.dumps(record) + "\n" for record in self.history)
            write_whole(self._metrics_path, lines.encode())
            self.writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self.purge_step)
            self._stack.callback(self.writer.close)
            if sys.stderr.isatty():
                self._stack.enter_context(logging_redirect_tqdm())  # log lines above the bar, not through it
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._stack.close()

    def start_epoch(self, epoch: int, num_steps: int, first_step: int = 0) -> None:
        """Opens the bar of an epoch, of which ``first_step`` of ``num_steps`` steps are done."""
        if self.runtime.is_main:
            self._bar = progress.progress_bar(
                total=num_steps,
                initial=first_step,
                desc=f"epoch {epoch + 1}/{self.num_epochs}",
                unit="step",
                leave=False,
                lines=False,  # ``window`` writes them
            )

    def flush(self) -> None:
        """Before a checkpoint: what TensorBoard has of the steps before it must not be lost with this process."""
        if self.writer is not None:
            self.writer.flush()

    def advance(self) -> None:
        """One optimiser step more."""
        if self._bar is not None:
            self._bar.update()

    def window(self, epoch: int, step: int, reading: Reading, learning_rates: dict[str, float]) -> None:
        """The readings since the last window; ``step`` optimiser steps are done."""
        if self.writer is None or self._bar is None:
            return
        for name, value in reading.losses.items() if reading.num_batches else ():
            self.writer.add_scalar(f"train/{name}", value, step)
        for name, value in learning_rates.items():
            self.writer.add_scalar(f"lr/{name}", value, step)
        if reading.gradient_norm is not None:
            self.writer.add_scalar("train/gradient_norm", reading.gradient_norm, step)
        self.writer.add_scalar("speed/images_per_second", reading.images_per_second, step)
        self.writer.add_scalar("speed/data_wait_share", reading.wait_share, step)

        text = f"{describe(reading)}, {_clock(self._seconds_left(step))} left"
        self._bar.set_postfix_str(text)
        now = time.perf_counter()
        if self._bar.disable and now - self._last_line > progress.SECONDS_BETWEEN_LINES:
            _log.info("epoch %d/%d, step %d/%d: %s", epoch + 1, self.num_epochs, step, self.num_steps, text)
            self._last_line = now

    def evaluation(self, metrics: Mapping[str, float], step: int) -> None:
        """What an evaluation gave; before the checkpoint that says it is done."""
        if self.writer is not None:
            for name, value in metrics.items():
                self.writer.add_scalar(f"val/{name}", value, step)
            self.writer.flush()

    def end_epoch(self, record: Mapping[str, Any], reading: Reading, *, shown_metric: str) -> None:
        """Closes the epoch's bar, prints its line and writes its record (``epoch_record``) down.

        Raises:
            OSError: it cannot be written; the message names the file.
        """
        if self.writer is None or self._bar is None:
            return
        self._bar.close()
        step, metrics = record["step"], record["metrics"]
        try:
            with self._metrics_path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OSError(error.errno, f"cannot be written: {error.strerror}", str(self._metrics_path)) from error
        result = f", {shown_metric} {metrics[shown_metric]:.4f}{' (best)' if record['best'] else ''}" if metrics else ""
        left = f", {_clock(self._seconds_left(step))} left" if step < self.num_steps else ""
        _log.info(
            "epoch %d/%d: %s%s, %.1f s%s",
            record["epoch"], self.num_epochs, describe(reading), result, record["seconds"], left,
        )  # fmt: skip
        self._last_line = time.perf_counter()

    @property
    def _metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def _say_what_is_mended(self) -> None:
        """Names what a killed run left in ``metrics.jsonl`` that is no line, and what it did not come to write."""
        lines = self._metrics_path.read_text(errors="replace").splitlines() if self._metrics_path.exists() else []
        records = [read_record(line) for line in lines]
        broken = [str(number) for number, record in enumerate(records, start=1) if record is None]
        if broken:
            _log.warning("%s: line %s is blank or cut off and is left out", self._metrics_path, ", ".join(broken))
        written = {record["epoch"] for record in records if record is not None}
        missing = [str(record["epoch"]) for record in self.history if record["epoch"] not in written]
        if missing:
            _log.warning(
                "%s: epoch %s is missing and is written from the checkpoint", self._metrics_path, ", ".join(missing)
            )

    def _seconds_left(self, step: int) -> float:
        done = max(step - self.first_step, 1)
        return (time.perf_counter() - self._start) / done * (self.num_steps - step)


def epoch_record(
    epoch: int,
    step: int,
    reading: Reading,
    learning_rates: dict[str, float],
    metrics: dict[str, float],
    *,
    is_best: bool,
    seconds: float,
) -> dict[str, Any]:
    """The line of an epoch in metrics.jsonl; ``epoch`` counts from 1, ``metrics`` is empty without an evaluation."""
    return {
        "epoch": epoch,
        "step": step,
        "lr": learning_rates,
        "losses": reading.losses,
        "images_per_second": round(reading.images_per_second, 2),
        "data_wait_share": round(reading.wait_share, 4),
        **({} if reading.gradient_norm is None else {"gradient_norm": reading.gradient_norm}),
        "seconds": round(seconds, 2),
        "metrics": metrics,
        "best": is_best,
    }


def read_record(line: str) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl, or None for one that is blank or cut off."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("epoch"), int) else None


def describe(reading: Reading) -> str:
    """ "loss 2.310 (box 1.200, class 1.110), 45.1 images/s, 3 % waiting for data"."""
    parts = ", ".join(f"{name} {value:.3f}" for name, value in reading.losses.items() if name != "loss")
    return (
        f"loss {reading.losses['loss']:.3f}{f' ({parts})' if parts else ''}, {reading.images_per_second:.1f} images/s, "
        f"{100 * reading.wait_share:.0f} % waiting for data"
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
