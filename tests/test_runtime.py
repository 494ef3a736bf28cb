"""Device, seeds, and how a tool ends."""

import ast
import copy
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.errors import UserError
from detection.cli import train, train_cls
from detection.engine.config import TrainConfig
from detection.engine.errors import main_errors
from detection.engine.runtime import Runtime, choose_device, open_runtime, seed_everything


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


def with_gpus(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_operators_on_a_gpu(monkeypatch: pytest.MonkeyPatch, deterministic: bool) -> None:
    with_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        with open_runtime("cuda", deterministic=deterministic):
            assert not torch.backends.cudnn.benchmark  # its search holds up the first step by half a minute
            assert torch.are_deterministic_algorithms_enabled() is deterministic
            assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("choice", "on_two_gpus", "on_none"),
    [
        ("auto", "cuda:0", "cpu"),
        (None, "cuda:0", "cpu"),
        ("cpu", "cpu", "cpu"),
        ("CPU", "cpu", "cpu"),
        (torch.device("cpu"), "cpu", "cpu"),
        (torch.device("cpu", 0), "cpu", "cpu"),
        ("cuda", "cuda:0", None),
        (torch.device("cuda"), "cuda:0", None),
        ("cuda:1", "cuda:1", None),
        (torch.device("cuda", 1), "cuda:1", None),
        (1, "cuda:1", None),
        ("cuda:2", None, None),
        ("mps", None, None),
        ("meta", None, None),
        ("xpu", None, None),
        (torch.device("meta"), None, None),
        ("cuda:x", None, None),
        ("gpu", None, None),
        ("", None, None),
        ("0", None, None),
        (-1, None, None),
        (True, None, None),
        (1.0, None, None),
        (["cpu"], None, None),
    ],
)
def test_devices(choice: Any, on_two_gpus: str | None, on_none: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for count, expected in ((2, on_two_gpus), (0, on_none)):
        with_gpus(monkeypatch, count)
        if expected is not None:
            assert choose_device(choice) == torch.device(expected)
        else:
            with pytest.raises(UserError, match=r"device (is|'cuda|'mps)"):
                choose_device(choice)


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    assert choose_device("auto", local_rank=1) == torch.device("cuda", 1)
    assert choose_device("cuda", local_rank=1) == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for choice in ("cuda:0", torch.device("cuda", 1), 1):
        with pytest.raises(UserError, match=r"is for one process, and torchrun started 2"), open_runtime(choice):
            pass


def test_apples_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("mps") == torch.device("mps")


def test_unknown_devices_are_refused_with_the_rest_of_the_config() -> None:
    TrainConfig(device="cuda:7").validate()  # whether it is there is another machine's matter
    with pytest.raises(UserError, match=r"device is 'gpu'; it can be 'auto', 'cpu', 'cuda', 'cuda:N' .* or 'mps'"):
        TrainConfig(device="gpu").validate()


def test_cuda_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"'cuda' was asked for, but torch \S+ finds no usable CUDA GPU.*use 'auto' or 'cpu'"
    ):
        choose_device("cuda")


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    with_gpus(monkeypatch, 2)
    with pytest.raises(
        UserError, match=r"process 2 .* has no GPU of its own: there are 2; .*--nproc-per-node 2 or fewer"
    ):
        choose_device("cuda", local_rank=2)


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_running_statistics_alone_are_averaged(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes one after the other, their tensors added up by hand."""

    class Network(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.register_buffer("anchors", torch.rand(100, 4, generator=torch.Generator().manual_seed(0)))
            self.trained, self.frozen = nn.BatchNorm2d(50), nn.BatchNorm2d(50)
            self.bare = nn.BatchNorm2d(50, track_running_stats=False)
            for norm, seed in ((self.trained, rank + 1), (self.frozen, 0)):
                generator = torch.Generator().manual_seed(seed)
                norm.running_mean.copy_(torch.rand(50, generator=generator))
                norm.running_var.copy_(torch.rand(50, generator=generator))

    networks = [Network(rank) for rank in range(world_size)]
    expected = torch.stack([network.trained.running_mean.double() for network in networks]).mean(0).float()
    before = copy.deepcopy(networks[0])
    sums: list[Tensor] = []  # of what each collective of the round before was given

    for network_of in (copy.deepcopy, lambda network: network):  # the first round adds up, the second gets the sums
        given: list[Tensor] = []
        for rank, network in enumerate(networks):
            calls = iter(range(1000))

            def all_reduce(
                tensor: Tensor, calls: Iterator[int] = calls, given: list[Tensor] = given, sums: list[Tensor] = sums
            ) -> None:
                call = next(calls)
                if call == len(given):
                    given.append(torch.zeros_like(tensor))
                given[call] += tensor
                if sums:
                    tensor.copy_(sums[call])

            monkeypatch.setattr(dist, "all_reduce", all_reduce)
            runtime = Runtime(device=torch.device("cpu"), rank=rank, world_size=world_size)
            runtime.average_buffers(network_of(network))
        sums = given
    for network in networks:
        torch.testing.assert_close(network.trained.running_mean, expected)
        assert torch.equal(network.trained.running_var, networks[0].trained.running_var)
        assert torch.equal(network.anchors, before.anchors)
        assert torch.equal(network.frozen.running_mean, before.frozen.running_mean), (
            "equal everywhere: not one bit changes"
        )
        assert torch.equal(network.frozen.running_var, before.frozen.running_var)


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
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB. GPU 0 has.\nMore"),
            "error: memory is full: fewer images at once (--batch-size, where there is one) need less, and so does --device "
            "cpu of a GPU. torch says: CUDA out of memory. Tried to allocate 96.00 MiB\n",
        ),
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
    assert capsys.readouterr().err == "stopped\n", "not every tool is a training"


def test_ctrl_c_of_a_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    for tool in (train, train_cls):
        monkeypatch.setattr(tool, "load_config", interrupted)
        with pytest.raises(SystemExit) as ended:
            tool.main(["a:recipe"])
        assert ended.value.code == 130
        assert "--train.resume" in capsys.readouterr().err


_TWO_PROCESSES = """
import sys
from backbones.errors import UserError
import torch.distributed as dist
from detection.engine.errors import main_errors
from detection.engine.runtime import open_runtime

destroy = dist.destroy_process_group
def slow_end():
    print("the group ends", file=sys.stderr, flush=True)
    destroy()
dist.destroy_process_group = slow_end

@main_errors
def main(argv=None):
    with open_runtime("cpu", num_threads=1) as runtime:
        if runtime.rank == 1:
            raise UserError("no such image")

main([])
"""


def test_error_of_one_process_is_told_before_the_group_ends() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO_PROCESSES],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 2]
    assert "error" not in told[0]
    lines = told[1].splitlines()
    assert lines == ["[1] error: no such image", "the group ends"], "once, and first"


def variables(code: str, **own: str) -> list[str]:
    """GOMP_SPINCOUNT and OMP_WAIT_POLICY after ``code`` ran in a process that has them from ``own`` alone."""
    environment = {name: value for name, value in os.environ.items() if name not in _WAITING} | own
    code += "; import os; print([os.environ.get(name) for name in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return ast.literal_eval(done.stdout)


_WAITING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def test_waiting_threads_soon_sleep() -> None:
    assert variables("import detection; import torch") == ["2000", None]
    assert variables("import detection", GOMP_SPINCOUNT="7") == ["7", None]
    assert variables("import detection", OMP_WAIT_POLICY="ACTIVE") == [None, "ACTIVE"]
    assert variables("import sys; sys.modules['torch'] = sys; import detection") == [None, None], (
        "torch has read it: nothing is to be changed"
    )


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
