"""Processes that meet in a store in which those of earlier starts met, or died while they did."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from backbones.errors import UserError
from detection.engine.rendezvous import Meeting, meet

SOON = timedelta(seconds=20)


def together(store: dist.Store, world_size: int) -> list[Meeting]:
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(lambda rank: meet(store, rank, world_size, SOON), range(world_size)))


@pytest.fixture
def store() -> dist.Store:
    return dist.HashStore()


def test_nobody_else(store: dist.Store) -> None:
    first = meet(store, 0, 1, SOON)
    first.store.set("address", "old")
    again = meet(store, 0, 1, SOON)
    assert (first.starts, again.starts) == (1, 2)
    assert not again.store.check(["address"])


def test_all_get_one_store_that_earlier_starts_did_not_see(store: dist.Store) -> None:
    for start, world_size in enumerate((3, 3, 2, 4), 1):  # nodes leave and come
        meetings = together(store, world_size)
        assert [meeting.starts for meeting in meetings] == [start] * world_size
        for rank, meeting in enumerate(meetings):
            assert not meeting.store.check(["address"])
            meeting.store.set(str(rank), "here")
        for meeting in meetings:
            assert meeting.store.check([str(rank) for rank in range(world_size)])
        meetings[0].store.set("address", "old by now")


def test_after_a_start_that_died_while_it_met(store: dist.Store) -> None:
    nobody = timedelta(seconds=0.1)
    for rank in (0, 1):  # process 0 went as far as its name; another answered it
        with pytest.raises(UserError, match=r"not all processes of this run came within 0 s"):
            meet(store, rank, 3, nobody)
    assert [meeting.starts for meeting in together(store, 3)] == [2, 2, 2]


def test_a_late_first_process_is_waited_for(store: dist.Store) -> None:
    together(store, 2)
    found: list[Meeting] = []
    other = threading.Thread(target=lambda: found.append(meet(store, 1, 2, SOON)))
    other.start()  # sees the name of the start before, under which all have met
    other.join(0.3)
    assert other.is_alive()
    assert meet(store, 0, 2, SOON).starts == 2
    other.join()
    assert found[0].starts == 2
