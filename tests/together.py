"""Several processes that know each other, for tests: forked by a process that has loaded torch, so that they start quickly.

    run_together([(2, train, (folder,)), (3, train, (folder,))])

runs ``train(folder)`` in two processes and then in three, with the environment that torchrun gives.
"""

import os
import pickle
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def compute_in_double() -> None:
    """Networks and losses of this process compute in float64.

    So small a network with random weights enlarges rounding: over a handful of numbers the variance of a batch norm is all but
    nothing. In float32 the losses of two processes and of one are some parts in a million apart in the first step, and a
    hundredth in the sixth.
    """
    import torch

    torch.set_default_dtype(torch.float64)
    to_float = torch.Tensor.float
    torch.Tensor.float = lambda self: self if self.dtype == torch.float64 else to_float(self)


def run_together(
    groups: Sequence[tuple[int, Callable[..., None], tuple[Any, ...]]], timeout: float = 900
) -> subprocess.CompletedProcess[str]:
    """Runs each (number of processes, function of a module in tests/, arguments) after the one before it.

    A process that fails ends its group and all that follows; what it said is in the error.
    """
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, __file__],
        input=pickle.dumps(list(groups)).hex(), capture_output=True, text=True, check=False, timeout=timeout,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def _run_group(world_size: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> bool:
    port = free_port()
    children = set()
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            status = 1
            try:
                function(*arguments)
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.add(child)
    while children:
        child, status = os.wait()
        children.discard(child)
        if status:
            time.sleep(1)  # for the others to say something
            for other in children:
                os.kill(other, 9)
            return False
    return True


if __name__ == "__main__":
    work = pickle.loads(bytes.fromhex(sys.stdin.read()))  # loads the modules of the functions
    sys.exit(0 if all(_run_group(*group) for group in work) else 1)
