"""Where the processes of one start of a run meet, when torchrun may start them again.

torchrun (``--rdzv-backend c10d``, ``--standalone``) keeps one store for all starts of a run. What the processes of an earlier
start left in it, the addresses of those that are dead, is then read by the next ones: Gloo fails with "connectFullMesh",
NCCL with "Connection refused" (pytorch/pytorch issue 135712). A prefix by ``TORCHELASTIC_RESTART_COUNT`` would not do: each
node counts its own failures alone, so that two nodes have different numbers.
"""

import json
import time
import uuid
from datetime import timedelta
from typing import NamedTuple

import torch.distributed as dist

from backbones.errors import UserError

_WAIT_SECONDS = 0.05  # between two looks at the store


class Meeting(NamedTuple):
    """What ``meet`` gives, the same on all processes.

    Attributes:
        store: theirs alone: nothing in it is of an earlier start.
        starts: how often processes have met in the store beneath it, this time included.
    """

    store: dist.Store
    starts: int


def meet(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> Meeting:
    """Agrees on a part of ``store`` that holds nothing of an earlier start. Every process of the start has to call it.

    Process 0 chooses a name that never was and waits for a mark of every other process under it; a process goes by a name
    only where its own mark came back, which no start before this one can know.

    Args:
        store: that all processes see, and perhaps earlier ones saw.
        rank, world_size: of this process.
        timeout: how long to wait for the others.

    Raises:
        UserError: the others did not come in time.
    """
    own = uuid.uuid4().hex
    end = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        starts = store.add("litedet/starts", 1)
        store.set("litedet/name", own)
        keys = [f"litedet/{own}/{other}" for other in range(1, world_size)]
        while keys and not store.check(keys):
            _wait(end, timeout)
        marks = [store.get(key).decode() for key in keys]
        store.set(f"litedet/{own}/all", json.dumps({"starts": starts, "marks": marks}))
        return Meeting(dist.PrefixStore(f"litedet/{own}", store), starts)

    answered = None
    while True:
        name = store.get("litedet/name").decode() if store.check(["litedet/name"]) else None
        if name is not None and name != answered:
            store.set(f"litedet/{name}/{rank}", own)
            answered = name
        if name is not None and store.check([f"litedet/{name}/all"]):
            answer = json.loads(store.get(f"litedet/{name}/all"))
            if own in answer["marks"]:
                return Meeting(dist.PrefixStore(f"litedet/{name}", store), answer["starts"])
        _wait(end, timeout)


def _wait(end: float, timeout: timedelta) -> None:
    if time.monotonic() > end:
        raise UserError(
            f"not all processes of this run came within {timeout.total_seconds():.0f} s; see whether one of them ended "
            "with a message of its own"
        )
    time.sleep(_WAIT_SECONDS)
