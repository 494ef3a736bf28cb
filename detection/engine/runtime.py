"""Where a run happens: device, processes, seeds, logging, and how a tool ends when the user made a mistake.

Several processes are started by ``torchrun``; this file reads what torchrun leaves in the environment.
"""

import contextlib
import ctypes
import importlib
import logging
import os
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.errors import UserError
from detection.engine.errors import EXPECTED, tell
from detection.engine.rendezvous import Meeting, meet
from detection.engine.streams import LineHandler
from detection.engine.workers import clear_failures

DeviceChoice: TypeAlias = str | int | torch.device | None
"""What ``choose_device`` takes."""

_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a process knows of the run it takes part in.

    Attributes:
        device: where this process computes.
        rank: number of this process, 0 .. world_size - 1. Process 0 alone writes files and prints progress.
        local_rank: number of this process on its machine.
        world_size: number of processes of the whole run.
        host_group: the processes as a group that exchanges tensors on the CPU; None where the default group does.
        repeats: whether this start repeats an earlier one of the same command, by itself: torchrun (``--max-restarts``, or
            a node that came or went) or Slurm (``--requeue``) did it.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    host_group: dist.ProcessGroup | None = None
    repeats: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Adds up ``tensor`` over all processes, in place. Every process has to call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any_over_processes(self, *flags: bool) -> list[bool]:
        """Whether each flag is set in any process. Every process has to call it; no GPU is waited for."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host_group)
        return found.bool().tolist()

    def union_over_processes(self, texts: Iterable[str]) -> set[str]:
        """The texts of all processes together. Every process has to call it."""
        own = set(texts)
        if self.world_size == 1:
            return own
        gathered: list[set[str]] = [set() for _ in range(self.world_size)]
        dist.all_gather_object(gathered, own)
        return set().union(*gathered)

    def average_buffers(self, module: nn.Module) -> None:
        """Gives every process the mean of the running statistics of batch norms, in place; other buffers stay.

        Every process has to call it.
        What is equal on all processes (a frozen norm) stays as it is to the bit, whatever their number.
        """
        if self.world_size == 1:
            return
        own = [
            statistic
            for norm in module.modules()
            if isinstance(norm, _BatchNorm)
            for statistic in (norm.running_mean, norm.running_var)
            if statistic is not None
        ]
        if not own:
            return
        # In float64 the mean of N equal float32 numbers is that number; in float32 it need not be (N = 3, 5, 6, 7).
        mean = self.sum_over_processes(torch.cat([statistic.double() for statistic in own])) / self.world_size
        for statistic, new in zip(own, mean.split([len(statistic) for statistic in own]), strict=True):
            statistic.copy_(new)


@contextmanager
def open_runtime(
    device: DeviceChoice = "auto", num_threads: int | None = None, *, deterministic: bool = False
) -> Iterator[Runtime]:
    """Prepares this process for a run and, where torchrun started it, joins the others (NCCL on GPUs, Gloo on CPUs).

    Process 0 logs from INFO on, the others warnings only. On a GPU matrix products may use TF32. cuDNN takes the
    convolutions that it expects to be quick: to try them all (``cudnn.benchmark``) held up the first step by 25 s on an
    H200 and made the later ones 3 % quicker (SSDLite, 192 images, bf16: 60.6 and 58.9 ms).

    N processes that share a batch train as one process does where their batch norms are synchronised (``synchronise_norms``).

    A ``UserError`` or the like that ends one of several processes is printed here, because leaving the others can take long.

    Args:
        device: see ``choose_device``; with several processes a GPU has no number, each process takes the one of its own.
        num_threads: threads of torch's operators in this process; None leaves torch's own choice.
        deterministic: on a GPU take the operators that give the same bits every time, for the rest of the process.

    Raises:
        UserError: see ``choose_device``; a device that several processes cannot share; a process that did not come; a data
            worker that was killed.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)
    if world_size > 1 and (chosen.type not in ("cpu", "cuda") or _has_number(device)):
        raise UserError(
            f"device {str(device)!r} is for one process, and torchrun started {world_size}; use 'auto', 'cpu' or 'cuda': "
            "each process then takes the GPU of its own number"
        )

    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if world_size == 1 else f"[{rank}] %(message)s",
        handlers=[LineHandler(sys.stdout)],
    )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
        if deterministic:
            choose_deterministic_operators()

    runtime = Runtime(device=chosen, rank=rank, local_rank=local_rank, world_size=world_size)
    repeats = any(int(os.environ.get(name) or 0) > 0 for name in _RESTART_COUNTS)
    meeting = _meet(rank, world_size)
    if world_size > 1:
        assert meeting is not None
        # Default arguments of this module are the group that is open when it is first imported, and DDP imports it: such a
        # group outlives destroy_process_group, and one of Gloo's threads that lives on can abort the interpreter's end.
        importlib.import_module("torch.distributed.nn.functional")
        backend, device_id = ("nccl", chosen) if chosen.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=meeting.store, rank=rank, world_size=world_size, device_id=device_id)
        if chosen.type == "cuda":
            runtime = replace(runtime, host_group=cast(dist.ProcessGroup, dist.new_group(backend="gloo")))
        (repeats,) = runtime.any_over_processes(repeats)  # a node counts the failures of its own processes alone
    runtime = replace(runtime, repeats=repeats or (meeting is not None and meeting.starts > 1))
    try:
        with clear_failures():
            yield runtime
    except EXPECTED as error:
        if world_size > 1:
            tell(error, f"[{rank}] ")
        raise
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def _meet(rank: int, world_size: int) -> Meeting | None:
    """With the other processes of this start; None where there are none and torchrun keeps no count of starts.

    Raises:
        UserError: see ``meet``.
    """
    if world_size == 1 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    store, _, _ = next(dist.rendezvous("env://"))
    return meet(store, rank, world_size, default_pg_timeout)


def choose_deterministic_operators() -> None:
    """Have torch, cuDNN and cuBLAS use operators that give the same bits every time; torch warns of one that has none.

    To be called before the first matrix product on a GPU: cuBLAS reads its setting once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def keep_freed_memory() -> None:
    """Tell the C library to keep memory that tensors no longer use, for the next ones. Linux with glibc; nothing elsewhere.

    glibc gives a block above 32 MB back to the system as soon as it is free, and a training step takes dozens of them: the
    system clears every page anew, which was a quarter of a step on a CPU (SSDLite, 320 px, batch 24: 3.4 to 2.5 s). In
    return the process holds about a quarter more memory.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, -1)  # never


def choose_device(choice: DeviceChoice = "auto", local_rank: int = 0) -> torch.device:
    """The device that ``choice`` means in process ``local_rank`` of this machine.

    Args:
        choice: "auto" or None: a CUDA GPU where there is one, else the CPU. "cpu", "cuda" (GPU number ``local_rank``),
            "cuda:1" or 1 (that GPU), "mps", or any of these as a ``torch.device``.

    Raises:
        UserError: the device is not here or is none of these; there are more processes on this machine than GPUs.
    """
    wanted = _parse_device(choice)
    if wanted is None:
        wanted = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted.type == "cpu":
        return torch.device("cpu")
    if wanted.type == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(f"device 'mps' was asked for, but torch {torch.__version__} finds no Apple GPU here")
        return torch.device("mps")
    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        raise UserError(
            f"device '{wanted}' was asked for, but torch {torch.__version__} finds no usable CUDA GPU here "
            f"(this torch {built}); use 'auto' or 'cpu', or install a driver and a CUDA build of torch"
        )
    num_gpus = torch.cuda.device_count()
    if _has_number(wanted):
        if wanted.index >= num_gpus:
            raise UserError(f"device '{wanted}' was asked for, but the GPUs here are cuda:0 to cuda:{num_gpus - 1}")
        return wanted
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: there are {num_gpus}; "
            f"start torchrun with --nproc-per-node {num_gpus} or fewer"
        )
    return torch.device("cuda", local_rank)


def check_device(choice: DeviceChoice) -> None:
    """For configs: refuses what names no device that ``choose_device`` knows. Whether it is here is seen when it is used.

    Raises:
        UserError: it names none.
    """
    _parse_device(choice)


def _parse_device(choice: DeviceChoice) -> torch.device | None:
    """None is for "auto"."""
    if choice is None or (isinstance(choice, str) and choice.strip().lower() == "auto"):
        return None
    device: torch.device | None = None
    if isinstance(choice, torch.device):
        device = choice
    elif isinstance(choice, int) and not isinstance(choice, bool) and choice >= 0:
        device = torch.device("cuda", choice)
    elif isinstance(choice, str):
        with contextlib.suppress(RuntimeError):  # torch's message lists two dozen kinds of devices
            device = torch.device(choice.strip().lower())
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(
            f"device is {choice!r}; it can be 'auto', 'cpu', 'cuda', 'cuda:N' (the GPU of that number) or 'mps'"
        )
    return device


def _has_number(choice: DeviceChoice) -> bool:
    device = _parse_device(choice)
    return device is not None and device.type == "cuda" and ":" in str(device)


def seed_everything(seed: int, *, epoch: int = 0, rank: int = 0, batch: int = 0) -> None:
    """Seeds torch (all devices), numpy and random for one batch of one process.

    The state depends on (seed, epoch, rank, batch) alone. A batch therefore draws the same numbers in a run that was
    stopped and resumed before it as in one that was not, and no generator has to be saved.
    """
    torch_seed, numpy_seed = np.random.SeedSequence((seed, epoch, rank, batch)).generate_state(2).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # noqa: NPY002  libraries draw from the global generator
    random.seed(numpy_seed)
