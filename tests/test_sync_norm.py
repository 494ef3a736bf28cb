"""Batch norms over several processes equal torch's in one process on all the images."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from together import run_together
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from backbones.layers import ConvNormAct
from detection.engine.runtime import open_runtime
from detection.engine.sync_norm import SyncBatchNorm, synchronise_norms

CPU = torch.device("cpu")
SHARES = {"even": [2, 2, 2], "uneven": [4, 1, 1], "a process without images": [5, 0, 1]}


def images() -> Tensor:
    # Large means: the variance as a difference of sums of squares would have no right digit in float32.
    return (
        torch.randn(6, 3, 5, 7, generator=torch.Generator().manual_seed(0))
        + torch.tensor([0.0, 1e3, -1e3])[:, None, None]
    )


def norms(name: str) -> nn.BatchNorm2d:
    torch.manual_seed(1)
    norm = nn.BatchNorm2d(
        3, affine=name != "without weights", momentum=None if name == "cumulative" else 0.1,
        track_running_stats=name != "without running statistics",
    )  # fmt: skip
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


NAMES = ("plain", "without weights", "cumulative", "without running statistics")


def two_steps(norm: nn.Module, share: slice, whole: Tensor) -> list[Tensor]:
    """Results, gradients of the input and of the weights, buffers; the loss weighs every number differently."""
    weights = torch.randn(whole.shape, generator=torch.Generator().manual_seed(2))
    collected = []
    for step in range(2):
        x = (whole[share] * (step + 1)).requires_grad_()
        result = norm(x)
        (result.sin() * weights[share]).sum().backward()
        collected += [result.detach(), x.grad]
    return collected


def check_numbers() -> None:
    with open_runtime("cpu", num_threads=1) as runtime:
        whole = images()
        for counts in SHARES.values():
            first = sum(counts[: runtime.rank])
            share = slice(first, first + counts[runtime.rank])
            for name in NAMES:
                expected, alone = two_steps(reference := norms(name), slice(0, 6), whole), norms(name)
                ours = synchronise_norms(alone, CPU)
                assert type(ours) is SyncBatchNorm
                given = two_steps(ours, share, whole)
                for got, wanted in zip(given, expected, strict=True):
                    torch.testing.assert_close(got, wanted[share], rtol=1e-4, atol=1e-4)
                for parameter, other in zip(ours.parameters(), reference.parameters(), strict=True):
                    dist.all_reduce(parameter.grad)
                    torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(
                    dict(ours.named_buffers()), dict(reference.named_buffers()), rtol=1e-5, atol=1e-5
                )

                ours.eval()
                torch.testing.assert_close(ours(whole), reference.eval()(whole))

        half = synchronise_norms(norms("plain"), CPU)(whole[:2].bfloat16())
        assert half.dtype == torch.bfloat16

        # compiled as one graph, wrapped as a training wraps it
        torch.manual_seed(3)
        network = nn.Sequential(ConvNormAct(3, 4), ConvNormAct(4, 4), nn.Flatten(), nn.Linear(140, 1))
        own = slice(2 * runtime.rank, 2 * runtime.rank + 2)
        gradients = []
        for compiled in (False, True):
            step = synchronise_norms(copy.deepcopy(network), CPU)
            if compiled:
                step.compile(fullgraph=True, backend="aot_eager")
            DistributedDataParallel(step)(images()[own]).square().sum().backward()
            gradients.append([parameter.grad for parameter in step.parameters()])
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_three_processes_equal_one() -> None:
    run_together([(3, check_numbers, ())])


def test_frozen_norms_and_parameters_stay_what_they_are(tmp_path: Path) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    network[0].eval().requires_grad_(False)
    before = [*network.parameters(), *network.buffers()]
    ours = synchronise_norms(network, CPU)
    assert [type(norm) for norm in ours] == [SyncBatchNorm] * 2
    assert [norm.training for norm in ours] == [False, True]
    assert all(a is b for a, b in zip([*ours.parameters(), *ours.buffers()], before, strict=True))
    assert [parameter.requires_grad for parameter in ours.parameters()] == [False, False, True, True]


@pytest.mark.parametrize(
    ("device", "compiled", "kind"),
    [("cuda", False, nn.SyncBatchNorm), ("cuda", True, SyncBatchNorm), ("cpu", False, SyncBatchNorm)],
)
def test_torchs_own_on_a_gpu(device: str, compiled: bool, kind: type) -> None:
    norm = synchronise_norms(nn.Sequential(nn.BatchNorm2d(3)), torch.device(device), compiled=compiled)[0]
    assert type(norm) is kind


def test_alone_and_in_evaluation_it_is_torchs() -> None:
    whole = images()
    for name in NAMES:
        reference, norm = norms(name), synchronise_norms(norms(name), CPU)
        for training in (True, False):
            torch.testing.assert_close(norm.train(training)(whole), reference.train(training)(whole), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"\[B, C, ...\] is needed, not \[3\]"):
        norm(torch.zeros(3))
