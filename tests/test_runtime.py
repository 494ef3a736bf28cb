"""Device, seeds, and how a tool ends."""

import random
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import nn

from backbones.errors import UserError
from detection.engine.runtime import Runtime, choose_device, main_errors, open_runtime, seed_everything


def test_one_process_on_a_cpu() -> None:
    with open_runtime("cpu") as runtime:
        assert runtime == Runtime(device=torch.device("cpu"), rank=0, local_rank=0, world_size=1)
        assert runtime.is_main
        assert runtime.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
        assert runtime.union_over_processes([]) == set()
        assert runtime.union_over_processes(["b", "a", "b"]) == {"a", "b"}
        norm = nn.BatchNorm1d(1)
        norm.running_mean.fill_(3.0)
        runtime.average_buffers(norm)
        assert norm.running_mean.item() == 3.0


def test_num_threads() -> None:
    before = torch.get_num_threads()
    try:
        with open_runtime("cpu", num_threads=1):
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_auto_takes_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cpu") == torch.device("cpu")


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"'cuda' was asked for, but torch \S+ finds no usable CUDA GPU.*use 'auto' or 'cpu'"
    ):
        choose_device("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match=r"process 2 .* has no GPU of its own: there are 2; .*--nproc-per-node 2 or fewer"
    ):
        choose_device("cuda", local_rank=2)


def draw() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()  # noqa: NPY002


def test_seeds_depend_on_seed_epoch_and_rank() -> None:
    drawn = []
    for seed, epoch, rank in [(0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_everything(seed, epoch=epoch, rank=rank)
        drawn.append(draw())
    assert drawn[0] == drawn[1]
    for generator in zip(*drawn[1:], strict=True):
        assert len(set(generator)) == 4


def ends_with(error: BaseException | None) -> int:
    @main_errors
    def main(argv: Sequence[str] | None = None) -> int:
        """What the tool does."""
        if error is not None:
            raise error
        return 7

    assert main.__doc__ == "What the tool does."
    return main([])


def test_main_without_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends_with(None) == 7
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("lr must be above 0"), "error: lr must be above 0\n"),
        (FileNotFoundError("a.json is not there"), "error: a.json is not there\n"),
        (FloatingPointError("the loss is no longer finite"), "error: the loss is no longer finite\n"),
    ],
)
def test_mistakes_of_the_user_end_in_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ends_with(error)
    assert ended.value.code == 2
    assert capsys.readouterr().err == line


def test_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        ends_with(KeyboardInterrupt())
    assert ended.value.code == 130
    assert "--train.resume" in capsys.readouterr().err


@pytest.mark.parametrize("error", [TypeError("ours"), KeyError("ours"), RuntimeError("ours")])
def test_mistakes_of_ours_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error), match="ours"):
        ends_with(error)


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITEDET_TRACEBACK", "1")
    with pytest.raises(ValueError, match="where does it come from"):
        ends_with(ValueError("where does it come from"))


def test_freed_memory_is_kept_on_a_cpu() -> None:
    # A block of 64 MB that is freed and asked for again comes from the same place, already there: no page faults.
    code = """
import resource, torch
from detection.engine.runtime import open_runtime

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.zeros(16_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
given_back = faults()
with open_runtime("cpu"):
    for _ in range(3):
        faults()
    print(given_back, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    if given_back < 10_000:
        pytest.skip("the C library of this system keeps freed memory anyway")
    assert kept < given_back / 10
