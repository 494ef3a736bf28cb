"""Groups, schedule and optimisers, with figures worked out by hand."""

from typing import Any

import pytest
import torch
from torch import nn

from detection.engine.optim import (
    OptimConfig,
    build_optimizer,
    build_schedule,
    lr_factor,
    num_warmup_steps,
    parameter_groups,
)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_norms_and_biases_have_no_decay() -> None:
    model = network()
    groups = parameter_groups(model, OptimConfig(lr=0.5, weight_decay=0.1), {})
    assert [(group["lr"], group["weight_decay"], group["name"]) for group in groups] == [
        (0.5, 0.1, "x1"),
        (0.5, 0.0, "x1"),
    ]
    assert [id(p) for p in groups[0]["params"]] == [id(model[0].weight), id(model[3].weight)]
    assert [id(p) for p in groups[1]["params"]] == [id(model[1].weight), id(model[1].bias), id(model[3].bias)]


def test_longest_prefix_sets_the_learning_rate() -> None:
    model = nn.ModuleDict({"backbone": network(), "head": nn.Linear(2, 1, bias=False)})
    groups = parameter_groups(model, OptimConfig(lr=1.0, weight_decay=0.1), {"backbone.": 0.1, "backbone.3.": 0.5})
    found = {(group["name"], group["weight_decay"]): (group["lr"], len(group["params"])) for group in groups}
    assert found == {
        ("x0.1", 0.1): (0.1, 1),
        ("x0.1", 0.0): (0.1, 2),
        ("x0.5", 0.1): (0.5, 1),
        ("x0.5", 0.0): (0.5, 1),
        ("x1", 0.1): (1.0, 1),
    }


def test_frozen_parameters_are_in_no_group() -> None:
    model = network()
    model[0].requires_grad_(False)
    groups = parameter_groups(model, OptimConfig(), {})
    assert sum(len(group["params"]) for group in groups) == 4


def test_prefix_without_a_parameter_is_refused() -> None:
    model = nn.ModuleDict({"backbone": network(), "head": nn.Linear(2, 1)})
    with pytest.raises(ValueError, match=r"no parameter begins with 'backbon\.'.*the network has backbone, head"):
        parameter_groups(model, OptimConfig(), {"backbon.": 0.1})


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="every parameter of the network is frozen"):
        parameter_groups(network().requires_grad_(False), OptimConfig(), {})


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2),  # warm-up of 4 steps: 1/5, 2/5, 3/5, 4/5
        (3, 0.8),
        (4, 1.0),  # the cosine begins: 0.1 + 0.9 * (1 + cos 0) / 2
        (9, 0.55),  # half of it: 0.1 + 0.9 * (1 + cos 90 degrees) / 2
        (13, 0.1220246),  # the last step: 0.1 + 0.9 * (1 + cos 162 degrees) / 2, cos 162 degrees = -0.9510565
        (14, 0.1),  # after the last
        (20, 0.1),
    ],
)
def test_warmup_then_cosine(step: int, expected: float) -> None:
    assert lr_factor(step, num_steps=14, warmup_steps=4, min_lr_share=0.1) == pytest.approx(expected, abs=1e-6)


def test_short_trainings_warm_up_less() -> None:
    config = OptimConfig(warmup_steps=500, warmup_max_share=0.1)
    assert num_warmup_steps(config, 900) == 90
    assert num_warmup_steps(config, 100_000) == 500
    assert num_warmup_steps(config, 5) == 0


def test_schedule_keeps_the_ratio_of_the_groups() -> None:
    model = nn.ModuleDict({"backbone": nn.Linear(1, 1, bias=False), "head": nn.Linear(1, 1, bias=False)})
    config = OptimConfig(lr=2.0, warmup_steps=1, warmup_max_share=1.0)
    optimizer = build_optimizer(parameter_groups(model, config, {"backbone.": 0.1}), config)
    schedule = build_schedule(optimizer, config, num_steps=3)
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    # factors 1/2, 1, (1 + cos 90 degrees) / 2
    assert rates == [pytest.approx([0.1, 1.0]), pytest.approx([0.2, 2.0]), pytest.approx([0.1, 1.0])]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_one_step_by_hand(name: str) -> None:
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(2.0)
    config = OptimConfig(name=name, lr=0.1, momentum=0.9, weight_decay=0.5)  # type: ignore[arg-type]
    optimizer = build_optimizer(parameter_groups(layer, config, {}), config)
    layer.weight.grad = torch.full((1, 1), 3.0)
    optimizer.step()
    # SGD: 2 - 0.1 * (3 + 0.5 * 2) = 1.6. AdamW: the decay apart, 2 * (1 - 0.1 * 0.5), then 0.1 * sign(3): 1.8
    assert layer.weight.item() == pytest.approx({"sgd": 1.6, "adamw": 1.8}[name], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.0}, "optim.lr must be above 0, not 0.0"),
        ({"momentum": 1.0}, "optim.momentum must be in 0 <= x < 1, not 1.0"),
        ({"beta2": -0.1}, "optim.beta2 must be in 0 <= x < 1, not -0.1"),
        ({"name": "adamw", "nesterov": True}, "optim.nesterov needs optim.name 'sgd'"),
        ({"weight_decay": -1.0}, "optim.weight_decay must not be negative, not -1.0"),
        ({"warmup_steps": -1}, "optim.warmup_steps must not be negative, not -1"),
        ({"warmup_max_share": 1.5}, "optim.warmup_max_share must be in 0 <= x <= 1, not 1.5"),
        ({"min_lr_share": 2.0}, "optim.min_lr_share must be in 0 <= x <= 1, not 2.0"),
        ({"clip_norm": 0.0}, "optim.clip_norm must be above 0 or None, not 0.0"),
    ],
)
def test_meaningless_values_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimConfig(**change).validate()
