"""The folder of a run: one training at a time, and what a resumed one takes from it."""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch.distributed as dist
from filelock import FileLock, Timeout

from backbones.errors import UserError
from backbones.state import remove_unfinished, write_whole
from detection.engine.checkpoint import load_checkpoint
from detection.engine.log import read_record
from detection.engine.plain import differences, to_plain
from detection.engine.runtime import Runtime
from detection.engine.state import TrainState

_log = logging.getLogger(__name__)

# Settings that may differ when a run is resumed, each with all below it: they change where and how fast it runs, not what
# it computes. The weights it once started from are in its checkpoint. (That the data are the same is checked by content.)
_FREE_ON_RESUME: tuple[str, ...] = (
    "run_dir", "weights", "data.root", "data.train", "data.val", "data.workers", "data.val_batch_size", "train.resume",
    "train.device", "train.num_threads", "train.deterministic", "train.log_every", "train.max_skipped_share",
    "train.checkpoint_every_steps", "train.checkpoint_every_minutes", "train.max_left_out",
)  # fmt: skip

# What a training alone writes, under its lock: the beginnings that a killed one left can go.
_WRITTEN = ("last.pt", "best.pt", "config.json", "metrics.jsonl")

# Before filelock 4, data workers of a killed process hold its lock until they see that it is gone: behind the batches that they
# have been asked for, torch looks every 5 s.
_ORPHAN_SECONDS = 30.0

_Value = TypeVar("_Value")
_Config = TypeVar("_Config", bound="RunConfig")


class RunConfig(Protocol):
    """The composed config of a training: a dataclass with at least these."""

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""

    @property
    def train(self) -> Any:
        """A ``TrainConfig``."""


@dataclass(slots=True, kw_only=True)
class Run(Generic[_Config]):
    """The folder of a run, which this training alone may write in. From ``open_run``.

    Attributes:
        folder: of the run; it is there.
        asked: the config as the user gave it.
        adopted: of a resumed run, the config that its network was built with; None for a new run.
        checkpoint: of a resumed run, the content of its ``last.pt``; None for a new run.
    """

    folder: Path
    asked: _Config
    adopted: _Config | None = None
    checkpoint: Mapping[str, Any] | None = None

    @property
    def best_path(self) -> Path:
        return self.folder / "best.pt"

    @property
    def last_path(self) -> Path:
        return self.folder / "last.pt"

    @property
    def extra(self) -> Mapping[str, Any] | None:
        """Of a resumed run, what its task's ``checkpoint_extra`` gave; None for a new run."""
        return None if self.checkpoint is None else self.checkpoint["extra"]

    def restore(self, state: TrainState) -> None:
        """Brings the state to where the run stopped; does nothing for a new run.

        Raises:
            UserError: see ``TrainState.load``.
        """
        if self.checkpoint is None:
            return
        state.load(self.checkpoint, self.last_path)
        if "history" not in self.checkpoint["training"]:  # written before the checkpoint held it
            path = self.folder / "metrics.jsonl"
            lines = path.read_text().splitlines() if path.exists() else []
            records = [record for record in map(read_record, lines) if record is not None]
            state.history = [record for record in records if record["epoch"] <= state.epoch]
        self.checkpoint = None  # its tensors are not needed twice

    def write_config(self, config: object) -> None:
        """Writes ``config.json``, the config as adopted."""
        write_whole(self.folder / "config.json", (json.dumps(to_plain(config), indent=2) + "\n").encode())


@contextmanager
def open_run(config: _Config, runtime: Runtime, read: Callable[[Mapping[str, Any]], _Config]) -> Iterator[Run[_Config]]:
    """Takes the run folder of a config for this training, until the context ends or the process does.

    Process 0 alone touches the folder; the others get what it read. A folder that was made here and in which no training
    began is removed again.

    Args:
        config: what the user asked for: ``config.train.resume`` says whether to go on with the run in the folder.
        runtime: this process.
        read: makes a config of the plain data in a checkpoint.

    Raises:
        UserError: another process trains in the folder; it holds a run and ``resume`` is off; it holds one with other
            settings, or no state to go on from.
        FileNotFoundError: there is nothing to resume.
    """
    with ExitStack() as stack:
        content = from_main(runtime, lambda: _open(config.run_dir, config.train.resume, runtime.repeats, stack))
        if content is None:
            yield Run(folder=config.run_dir, asked=config)
            return
        adopted = _check_settings(content, config, read)
        yield Run(folder=config.run_dir, asked=config, adopted=adopted, checkpoint=content)


def from_main(runtime: Runtime, make: Callable[[], _Value]) -> _Value:
    """What ``make`` gives in process 0, in every process. Every process has to call it.

    Raises:
        Exception: in process 0, what ``make`` raised; in the others a UserError with its message.
    """
    if runtime.world_size == 1:
        return make()
    answer: list[Any] = [None, None]
    if runtime.is_main:
        try:
            answer[0] = make()
        except Exception as error:
            dist.broadcast_object_list([None, str(error)])
            raise
    dist.broadcast_object_list(answer)
    if answer[1] is not None:
        raise UserError(answer[1])
    value: _Value = answer[0]
    return value


def _open(run_dir: Path, resume: bool, repeats: bool, stack: ExitStack) -> dict[str, Any] | None:
    """Locks the folder and gives the checkpoint to go on from, or None for a new run.

    A start that ``repeats`` another has the command line of the first: it goes on with what there is.
    """
    last_path = run_dir / "last.pt"
    if repeats:
        resume = last_path.exists()
    if resume and not last_path.exists():
        raise FileNotFoundError(
            f"{last_path} is not there, so there is nothing to resume; start without --train.resume"
        )
    stack.enter_context(_locked(run_dir))
    for name in _WRITTEN:
        remove_unfinished(run_dir / name)
    if not resume:
        if last_path.exists():
            raise UserError(
                f"{run_dir} already holds a run; go on with it by --train.resume True or use another --run-dir"
            )
        return None
    content = load_checkpoint(last_path)
    if "training" not in content:
        raise UserError(f"{last_path} holds weights alone and no state to go on from; is it a copy of a best.pt?")
    return content


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    made = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run_dir / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(
                f"{run_dir} is in use; waiting {_ORPHAN_SECONDS:g} s at most, in case it is by workers of a killed training",
                flush=True,
            )
            lock.acquire(timeout=_ORPHAN_SECONDS)
    except Timeout:
        raise UserError(
            f"{run_dir}: another training is running in this folder; wait for its end, or use another --run-dir"
        ) from None
    try:
        yield
    finally:
        if not (run_dir / "config.json").exists():  # no training began
            (run_dir / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()
        lock.release()


def _check_settings(
    content: Mapping[str, Any], config: _Config, read: Callable[[Mapping[str, Any]], _Config]
) -> _Config:
    """The config that the checkpoint's network was built with, if the run was started with the settings of ``config``."""
    try:
        adopted = read(content["config"])
        asked = content["training"].get("asked")
        was = adopted if asked is None else read(asked)
    except UserError as error:
        raise UserError(f"{config.run_dir / 'last.pt'}: {error}") from error
    free = _FREE_ON_RESUME
    if asked is None and getattr(adopted, "weights", None) is not None:
        free = (*free, "model", "loss")  # an old file, which says only what was adopted
    changes = [
        change
        for change in differences(was, config)
        if not any(change.name == name or change.name.startswith(f"{name}.") for name in free)
    ]
    if changes:
        raise UserError(
            f"{config.run_dir} was started with other settings: "
            f"{'; '.join(f'{change.name} {change.was!r} -> {change.now!r}' for change in changes)}. "
            f"Resume with the same ones, or start a new run in another --run-dir"
        )
    return adopted
