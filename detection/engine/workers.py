"""A data loader whose batches do not depend on its workers, and whose workers fail with a message.

torch's ``DataLoader`` alone falls short of what a training needs in three ways:

* It draws the seed of its workers from the global generator: once where they stay alive, every epoch where there are none.
  What a training draws afterwards (dropout) then depends on the number of workers, and on whether it was resumed.
* Where /dev/shm is full, a worker's batch fails in a thread that only prints the error, and the training waits forever.
* A worker that was killed is a traceback through torch.
"""

import atexit
import dataclasses
import re
import shutil
import signal
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from backbones.errors import UserError

_Batch = TypeVar("_Batch")

_SHARED_MEMORY = Path("/dev/shm")
_KILLED = re.compile(r"DataLoader worker \(pid.*\) (is killed by signal: (?P<signal>[\w ]+)|exited unexpectedly)")


class BatchLoader(DataLoader[Any], Generic[_Batch]):
    """A ``DataLoader`` over batches that are made of tensors. Its workers stay alive between epochs.

    The global generators are left alone: the same seed gives the same training with any number of workers, and after
    a resume. A dataset whose randomness follows from its keys is therefore the same in every process.

    Args:
        dataset: any.
        sampler: gives the keys of ``dataset``; with ``set_epoch`` where the order changes from epoch to epoch.
        collate: samples -> batch: a tensor, a dataclass, a dict or a sequence of such. It has to be picklable.
        batch_size: images of a batch.
        num_workers: processes that run ``dataset`` and ``collate``; 0 does it in this one.
        drop_last: without an incomplete last batch.
        pin_memory: page-locked batches, for copies to CUDA that the host does not wait for.
        seed: of the workers' own generators.

    Raises (while it is iterated over):
        UserError: a worker was killed, or there is no shared memory left for its batches.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        sampler: Sampler[Any],
        collate: Callable[[Sequence[Any]], _Batch],
        batch_size: int,
        num_workers: int = 0,
        drop_last: bool = False,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_SharingCollate(collate),
            drop_last=drop_last,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            worker_init_fn=_init_worker,
            generator=torch.Generator().manual_seed(seed),
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The epoch of the next iteration, and the batch that it begins with; those before are not even decoded.

        For samplers with ``set_epoch(epoch, first_key)``.
        """
        assert self.batch_size is not None
        self.sampler.set_epoch(epoch, first_batch * self.batch_size)  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[_Batch]:  # type: ignore[override]  # torch's own iterator, not any
        first = self._iterator is None
        with clear_failures():
            batches = super().__iter__()
            if first and self.num_workers:
                # After torch's own, hence before it: that one sends SIGTERM, which our workers ignore, and then waits for them.
                atexit.register(_end_workers, weakref.ref(self))
            for batch in batches:
                if isinstance(batch, _NoRoom):
                    raise UserError(_no_room(f" for a batch of {batch.num_bytes / 2**20:,.1f} MiB"))
                yield batch


def _end_workers(loader: "weakref.ref[BatchLoader[Any]]") -> None:
    """Ends the workers of a loader that is still there when the interpreter ends, in a global or in a cycle of references."""
    found = loader()
    if found is not None and found._iterator is not None:
        found._iterator._shutdown_workers()  # type: ignore[attr-defined]  # what torch does when the iterator is deleted


@dataclass(frozen=True, slots=True)
class _NoRoom:
    """Comes in place of a batch that does not fit into shared memory."""

    num_bytes: int


class _SharingCollate(Generic[_Batch]):
    """Makes a batch and, in a worker, moves it to shared memory at once.

    torch would do the same later, in the thread that writes to the queue. There an error is printed and the batch is gone.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], _Batch]) -> None:
        self._collate = collate

    def __call__(self, samples: Sequence[Any]) -> _Batch | _NoRoom:
        batch = self._collate(samples)
        if get_worker_info() is None:
            return batch
        tensors = list(_tensors(batch))
        num_bytes = sum(tensor.nbytes for tensor in tensors)
        # torch 2.9 does not ask whether there is room: the write that finds none ends the worker.
        if _SHARED_MEMORY.is_dir() and num_bytes > shutil.disk_usage(_SHARED_MEMORY).free:
            return _NoRoom(num_bytes)
        try:
            for tensor in tensors:
                tensor.share_memory_()
        except RuntimeError:
            return _NoRoom(num_bytes)
        return batch


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        if batch.numel():
            yield batch
    elif dataclasses.is_dataclass(batch):
        for field in dataclasses.fields(batch):
            yield from _tensors(getattr(batch, field.name))
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


@contextmanager
def clear_failures() -> Iterator[None]:
    """Turns torch's errors about data workers into ``UserError`` with what to do.

    A worker that is killed raises in the process that waits for it, at whatever place it is: in the middle of a training
    step too. ``open_runtime`` and ``main_errors`` therefore use this as well.
    """
    try:
        yield
    except RuntimeError as error:
        killed = _KILLED.search(str(error))
        if killed is None:
            raise
        signal = (killed["signal"] or "").strip()
        if signal == "Bus error":
            raise UserError(_no_room("")) from error
        raise UserError(
            f"a data worker {f'was killed by a signal ({signal})' if signal else 'ended unexpectedly'}. The system kills "
            "processes when memory runs out (dmesg shows it): use fewer data workers (a training's --data.workers) or "
            "smaller batches"
        ) from error


def _no_room(for_what: str) -> str:
    text = f"a data worker finds no room in shared memory{for_what}"
    if _SHARED_MEMORY.is_dir():
        room = shutil.disk_usage(_SHARED_MEMORY)
        text += f": {room.free / 2**20:,.1f} of {room.total / 2**20:,.1f} MiB are free in {_SHARED_MEMORY}"
    return (
        f"{text}. Use fewer data workers (a training's --data.workers; 0 needs no shared memory) or smaller batches, or "
        "make it larger: docker run --shm-size=8g, or --ipc=host"
    )


def _init_worker(worker: int) -> None:
    # Ctrl-C and a batch system's SIGTERM reach a whole group of processes. The training ends the step it is in and then
    # its workers; without them it could not.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(
        0
    )  # the processes share the work; threads inside them would only compete (torch sets its own to 1)
