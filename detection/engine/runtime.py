"""Where a run happens: device, processes, seeds, logging, and how a tool ends when the user made a mistake.

Several processes are started by ``torchrun``; this file reads what torchrun leaves in the environment.
"""

import ctypes
import functools
import importlib
import logging
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.errors import UserError

DeviceChoice = Literal["auto", "cpu", "cuda"]

_Main = TypeVar("_Main", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What a process knows of the run it takes part in.

    Attributes:
        device: where this process computes.
        rank: number of this process, 0 .. world_size - 1. Process 0 alone writes files and prints progress.
        local_rank: number of this process on its machine.
        world_size: number of processes of the whole run.
    """

    device: torch.device
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_processes(self, tensor: Tensor) -> Tensor:
        """Adds up ``tensor`` over all processes, in place. Every process has to call it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def union_over_processes(self, texts: Iterable[str]) -> set[str]:
        """The texts of all processes together. Every process has to call it."""
        own = set(texts)
        if self.world_size == 1:
            return own
        gathered: list[set[str]] = [set() for _ in range(self.world_size)]
        dist.all_gather_object(gathered, own)
        return set().union(*gathered)

    def average_buffers(self, module: nn.Module) -> None:
        """Gives every process the mean of the floating-point buffers (running statistics of batch norms), in place."""
        if self.world_size > 1:
            for buffer in module.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.world_size


@contextmanager
def open_runtime(device: DeviceChoice = "auto", num_threads: int | None = None) -> Iterator[Runtime]:
    """Prepares this process for a run and, where torchrun started it, joins the others (NCCL on GPUs, Gloo on CPUs).

    Process 0 logs from INFO on, the others warnings only. On a GPU matrix products may use TF32, and cuDNN picks the
    quickest convolution for the input sizes it meets: training has a fixed input size.

    Args:
        device: "auto" takes a CUDA device where there is one.
        num_threads: threads of torch's operators in this process; None leaves torch's own choice.

    Raises:
        UserError: CUDA was asked for where there is none, or there are more processes on this machine than GPUs.
    """
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, local_rank)

    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if world_size == 1 else f"[{rank}] %(message)s",
        stream=sys.stdout,
    )
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if chosen.type == "cpu":
        keep_freed_memory()
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True

    if world_size > 1:
        # Default arguments of this module are the group that is open when it is first imported, and DDP imports it: such a
        # group outlives destroy_process_group, and one of Gloo's threads that lives on can abort the interpreter's end.
        importlib.import_module("torch.distributed.nn.functional")
        if chosen.type == "cuda":
            dist.init_process_group("nccl", device_id=chosen)
        else:
            dist.init_process_group("gloo")
    try:
        yield Runtime(device=chosen, rank=rank, local_rank=local_rank, world_size=world_size)
    finally:
        if world_size > 1:
            dist.destroy_process_group()


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


def choose_device(choice: DeviceChoice, local_rank: int = 0) -> torch.device:
    """The device that ``choice`` means in process ``local_rank`` of this machine.

    Raises:
        UserError: see ``open_runtime``.
    """
    if choice == "cpu" or (choice == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        raise UserError(
            f"device 'cuda' was asked for, but torch {torch.__version__} finds no usable CUDA GPU here "
            f"(this torch {built}); use 'auto' or 'cpu', or install a driver and a CUDA build of torch"
        )
    num_gpus = torch.cuda.device_count()
    if local_rank >= num_gpus:
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own: there are {num_gpus}; "
            f"start torchrun with --nproc-per-node {num_gpus} or fewer"
        )
    return torch.device("cuda", local_rank)


def seed_everything(seed: int, *, epoch: int = 0, rank: int = 0) -> None:
    """Seeds torch (all devices), numpy and random for one epoch of one process.

    The state depends on (seed, epoch, rank) alone. An epoch therefore draws the same numbers in a run that was
    stopped and resumed before it as in one that was not, and no generator has to be saved.
    """
    torch_seed, numpy_seed = np.random.SeedSequence((seed, epoch, rank)).generate_state(2).tolist()
    torch.manual_seed(torch_seed)
    np.random.seed(numpy_seed)  # noqa: NPY002  libraries draw from the global generator
    random.seed(numpy_seed)


def main_errors(main: _Main) -> _Main:
    """Decorates a tool's ``main(argv)``: a user's mistake ends in one clear line, a mistake of ours in a traceback.

    ``UserError``, ``OSError`` and ``FloatingPointError`` (a training that diverged) become "error: ..." on stderr and
    exit code 2 (argparse's and tyro's code for wrong usage), Ctrl-C becomes a hint and exit code 130 (the shell's code
    for it). With LITEDET_TRACEBACK=1 in the environment nothing is turned, for whoever looks for the place in the code.
    """

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> Any:
        if os.environ.get("LITEDET_TRACEBACK") == "1":
            return main(argv)
        try:
            return main(argv)
        except (UserError, OSError, FloatingPointError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from error
        except KeyboardInterrupt as error:
            print(
                "stopped; a training goes on from its last whole epoch with the same command and --train.resume True",
                file=sys.stderr,
            )
            raise SystemExit(130) from error

    return cast(_Main, run)
