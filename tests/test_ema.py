"""The moving average: figures worked out by hand, and the library's average as the reference."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from detection.engine.ema import EmaConfig, ExponentialAverage, ema_decay


def share_of_first_weights(decays: list[float]) -> float:
    share = 1.0
    for decay in decays:
        share *= decay
    return share


@pytest.mark.parametrize(
    ("num_updates", "num_steps", "expected"),
    [
        (0, 100_000, 0.1),  # (1 + 0) / (10 + 0)
        (1, 100_000, 2 / 11),
        (90, 100_000, 0.91),
        (99_999, 100_000, 0.998),  # the decay that was asked for: (1 + t) / (10 + t) is 0.99991 by now
        (899, 900, 0.98),  # a horizon of 50 steps, 900 / 18: 1 - 1/50
        (0, 1, 0.0),  # a horizon of less than a step: the weights themselves
    ],
)
def test_decay(num_updates: int, num_steps: int, expected: float) -> None:
    config = EmaConfig(decay=0.998, horizon_share=1 / 18)
    assert ema_decay(num_updates, config, num_steps) == pytest.approx(expected, abs=1e-12)


def test_short_training_forgets_where_it_began() -> None:
    # The trap: a constant decay of 0.998 keeps a sixth of the random weights after 900 steps, exp(900 * ln 0.998) = 0.165.
    assert share_of_first_weights([0.998] * 900) == pytest.approx(0.165, abs=5e-4)
    ours = [ema_decay(t, EmaConfig(decay=0.998), 900) for t in range(900)]
    assert share_of_first_weights(ours) < 1e-12


def test_short_training_keeps_up_with_the_weights() -> None:
    # Weights that grow by 1 a step are trailed by d / (1 - d) steps: 499 with a decay of 0.998, more than half of the
    # training; with a horizon of 0.05 * 900 = 45 steps it is 44.
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    ema = ExponentialAverage(layer, EmaConfig(decay=0.998, horizon_share=0.05), 900)
    for step in range(1, 901):
        with torch.no_grad():
            layer.weight.fill_(float(step))
        ema.update(layer)
    assert 900 - ema.model.weight.item() == pytest.approx(44.0, abs=0.01)


def test_first_updates_by_hand() -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(0.0)
    ema = ExponentialAverage(layer, EmaConfig(), 10_000)
    with torch.no_grad():
        layer.weight.fill_(10.0)
    ema.update(layer)
    assert ema.model.weight.item() == pytest.approx(9.0)  # 0.1 * 0 + 0.9 * 10
    with torch.no_grad():
        layer.weight.fill_(20.0)
    ema.update(layer)
    assert ema.model.weight.item() == pytest.approx(18.0)  # 2/11 * 9 + 9/11 * 20
    assert layer.weight.item() == 20.0


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    norm = nn.BatchNorm1d(1)
    ema = ExponentialAverage(norm, EmaConfig(), 10_000)
    norm.running_mean.fill_(10.0)
    norm.running_var.fill_(11.0)
    norm.num_batches_tracked.fill_(7)
    ema.update(norm)
    assert ema.model.running_mean.item() == pytest.approx(9.0)  # from 0: 0.9 * 10
    assert ema.model.running_var.item() == pytest.approx(10.0)  # from 1: 0.1 * 1 + 0.9 * 11
    assert ema.model.num_batches_tracked.item() == 7


def test_all_counters_are_copied_by_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    copy_all = torch._foreach_copy_

    def counted(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        calls.append(len(targets))
        copy_all(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    norms = nn.Sequential(*(nn.BatchNorm1d(1) for _ in range(5)))
    ExponentialAverage(norms, EmaConfig(), 10).update(norms)
    assert calls == [5]


def test_average_is_for_evaluation_and_shares_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).train()
    ema = ExponentialAverage(model, EmaConfig(), 10)
    assert not ema.model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    pointers = {tensor.data_ptr() for tensor in ema.model.state_dict().values()}
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in model.state_dict().values())


def test_equals_the_library_at_a_constant_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detection.engine.ema.ema_decay", lambda num_updates, config, num_steps: 0.9)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    reference.update_parameters(model)  # its first update copies
    ema = ExponentialAverage(model, EmaConfig(), 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(5):
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model)
        reference.update_parameters(model)
    ours, theirs = ema.model.state_dict(), reference.module.state_dict()
    del ours["1.num_batches_tracked"], theirs["1.num_batches_tracked"]  # the library averages this one too
    torch.testing.assert_close(ours, theirs)


def test_state_goes_on_where_it_was() -> None:
    model = nn.Linear(2, 2)
    ema = ExponentialAverage(model, EmaConfig(), 100)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    state = copy.deepcopy(ema.state_dict())

    other = ExponentialAverage(nn.Linear(2, 2), EmaConfig(), 100)
    other.load_state_dict(state)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model)
    other.update(model)
    assert other.num_updates == 2
    torch.testing.assert_close(other.model.state_dict(), ema.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decay": 1.0}, "ema.decay must be in 0 <= x < 1, not 1.0"),
        ({"horizon_share": 0.0}, "ema.horizon_share must be in 0 < x <= 1, not 0.0"),
    ],
)
def test_meaningless_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EmaConfig(**change).validate()
