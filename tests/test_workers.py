"""Data workers: what they leave alone, and how they fail."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from backbones.errors import UserError
from detection.engine.errors import main_errors
from detection.engine.workers import BatchLoader, clear_failures


@dataclass(slots=True)
class Numbers:
    values: Tensor
    skipped: list[str]


class Counting(Dataset[int]):
    """0, 1, 2 ... ; the process that is asked for ``deadly`` is killed."""

    def __init__(self, deadly: int | None = None) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return 8

    def __getitem__(self, position: int) -> int:
        if position == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        return position


def collate(samples: Sequence[int]) -> Numbers:
    return Numbers(torch.tensor(samples), [])


def loader_of(num_workers: int, dataset: Counting | None = None) -> BatchLoader[Numbers]:
    dataset = dataset or Counting()
    return BatchLoader(
        dataset, sampler=SequentialSampler(dataset), collate=collate, batch_size=3, num_workers=num_workers
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_and_the_global_generator_stays_as_it_is(num_workers: int) -> None:
    loader = loader_of(num_workers)
    before = torch.get_rng_state()
    for _ in range(2):
        assert [batch.values.tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5], [6, 7]]
        assert torch.equal(torch.get_rng_state(), before)


def test_empty_batches_go_through_workers() -> None:
    dataset = Counting()
    loader = BatchLoader(
        dataset,
        sampler=SequentialSampler(dataset),
        collate=lambda samples: {"values": (torch.zeros(0, 4), torch.ones(len(samples)))},
        batch_size=4,
        num_workers=1,
    )
    assert [batch["values"][0].shape for batch in loader] == [(0, 4), (0, 4)]


def test_killed_worker() -> None:
    with pytest.raises(
        UserError, match=r"a data worker (was killed by a signal \(Killed\)|ended unexpectedly)\. The sys.*"
    ):
        list(loader_of(1, Counting(deadly=4)))


def test_no_room_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: Tensor) -> Tensor:
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"
        )

    monkeypatch.setattr(Tensor, "share_memory_", refuse)
    with pytest.raises(
        UserError, match=r"no room in shared memory for a batch of 0\.0 MiB.*--data\.workers.*--shm-size=8g"
    ):
        list(loader_of(1))
    assert len(list(loader_of(0))) == 3, "without workers none is needed"


def test_small_shared_memory_ends_with_a_message() -> None:
    """The real thing, in a mount namespace of its own: without the mending the process waits for ever."""
    unshare = shutil.which("unshare")
    mounted = "mount -t tmpfs -o size=1m tmpfs /dev/shm"
    if unshare is None or subprocess.run([unshare, "-m", "sh", "-c", mounted], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here (that takes unshare and root)")
    code = """
import torch
from torch.utils.data import SequentialSampler
from detection.engine.errors import main_errors
from detection.engine.workers import BatchLoader

@main_errors
def main(argv=None):
    data = torch.zeros(8, 3, 400, 400)
    list(BatchLoader(data, sampler=SequentialSampler(data), collate=torch.stack, batch_size=2, num_workers=2))

main([])
"""
    command = [unshare, "-m", "sh", "-c", f'{mounted} && exec "$0" "$@"', sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: a data worker finds no room in shared memory for a batch of 3.7 MiB: ")
    assert "of 1.0 MiB are free in /dev/shm" in done.stderr
    assert "--shm-size" in done.stderr
    assert "--data.workers" in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", r"killed by a signal \(Killed\).*--data\.workers"),
        ("DataLoader worker (pid(s) 7, 8) exited unexpectedly", r"ended unexpectedly.*--data\.workers"),
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
            "shared memory. Please try to raise your shared memory limit.",
            r"no room in shared memory.*--shm-size",
        ),
    ],
)
def test_torchs_texts(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=message), clear_failures():
        raise RuntimeError(text)

    @main_errors
    def tool(argv: Sequence[str] | None = None) -> None:
        raise RuntimeError(text)  # the signal of a dead worker reaches this process wherever it is

    with pytest.raises(SystemExit):
        tool([])
    assert capsys.readouterr().err.startswith("error: a data worker ")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match=r"^a matrix does not fit$"), clear_failures():
        raise RuntimeError("a matrix does not fit")


def test_the_process_ends_while_a_loader_is_still_referenced() -> None:
    """Workers ignore SIGTERM, with which multiprocessing ends its children, and waited forever for their next batch."""
    code = "import test_workers; loader = test_workers.loader_of(2); print(sum(len(batch.values) for batch in loader))"
    tests = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tests, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "8", "")
