"""LiteDet's loss against a slow loop that a person can read. Run: pytest tests/test_litedet_loss.py"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_task_aligned import ANCHORS, CODER, assign_slowly, drawn

from detection.models.box_coders import SSDBoxCoder
from detection.models.litedet import LiteDetConfig
from detection.structures import RawPredictions, Target
from detection.training.litedet_loss import LiteDetLoss, LiteDetLossConfig
from detection.training.task_aligned import TaskAlignedConfig


def loss_slowly(config: LiteDetLossConfig, raw: RawPredictions, target: Target) -> dict[str, float]:
    """One image after the other, one anchor after the other."""
    positives, qualities, box, classification, distribution = 0, 0.0, 0.0, 0.0, 0.0
    for b in range(len(raw.class_logits)):
        boxes, labels = target.boxes[b, target.valid[b]], target.labels[b, target.valid[b]]
        predicted = CODER.decode(raw.codes[b], ANCHORS)
        owner = assign_slowly(config.assigner, predicted, raw.class_logits[b], boxes, labels, ANCHORS)
        positives += len(owner)
        for a, (m, quality) in owner.items():
            qualities += quality
            box += quality * (1 - giou_slowly(predicted[a].tolist(), boxes[m].tolist()))
            stride = float(ANCHORS[a, 2] - ANCHORS[a, 0])
            x, y = (float(ANCHORS[a, i] + ANCHORS[a, i + 2]) / 2 for i in (0, 1))
            x1, y1, x2, y2 = boxes[m].tolist()
            for side, distance in enumerate((x - x1, y - y1, x2 - x, y2 - y)):
                place = min(max(distance / stride - CODER.first, 0), CODER.bins - 1)
                left = min(int(place), CODER.bins - 2)
                logits = raw.codes[b, a, side * CODER.bins : (side + 1) * CODER.bins].log_softmax(0)
                surprise = -(left + 1 - place) * float(logits[left]) - (place - left) * float(logits[left + 1])
                distribution += quality * surprise / 4
        for a in range(len(ANCHORS)):
            for c in range(raw.class_logits.shape[2]):
                m, quality = owner.get(a, (-1, 0.0))
                wanted = quality if m >= 0 and int(labels[m]) == c else 0.0
                p = 1 / (1 + math.exp(-float(raw.class_logits[b, a, c])))
                surprise = -wanted * math.log(p) - (1 - wanted) * math.log(1 - p)
                classification += abs(wanted - p) ** config.focal_gamma * surprise
    normaliser = max(qualities, 1.0)
    return {
        "loss_class": classification / normaliser,
        "loss_box": box / normaliser,
        "loss_distribution": distribution / normaliser,
        "positives": positives / len(raw.class_logits),
    }


def giou_slowly(first: list[float], second: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1, 0) * max(y2 - y1, 0)

    intersection = area(*map(max, first[:2], second[:2]), *map(min, first[2:], second[2:]))
    union = area(*first) + area(*second) - intersection
    hull = area(*map(min, first[:2], second[:2]), *map(max, first[2:], second[2:]))
    return intersection / union - (hull - union) / hull


CONFIGS = [
    LiteDetLossConfig(),
    LiteDetLossConfig(
        focal_gamma=1.5,
        box_weight=1.0,
        classification_weight=3.0,
        distribution_weight=0.5,
        assigner=TaskAlignedConfig(anchors_per_object=4, least_quality=0.2),
    ),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("num_objects", [0, 1, 6])
def test_batch_equals_the_slow_loop(config: LiteDetLossConfig, num_objects: int) -> None:
    raw, target = drawn(num_objects, seed=3)
    losses = LiteDetLoss(config, CODER)(raw, target)
    expected = loss_slowly(config, raw, target)
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    total = (
        config.classification_weight * expected["loss_class"]
        + config.box_weight * expected["loss_box"]
        + config.distribution_weight * expected["loss_distribution"]
    )
    assert losses["loss"].item() == pytest.approx(total, rel=1e-4)


def test_the_defaults_add_up_by_hand() -> None:
    raw, target = drawn(6, seed=3)
    losses = {name: value.item() for name, value in LiteDetLoss(LiteDetLossConfig(), CODER)(raw, target).items()}
    total = losses["loss_class"] + 2 * losses["loss_box"] + 0.25 * losses["loss_distribution"]
    assert losses["loss"] == pytest.approx(total, rel=1e-5)
    assert (LiteDetLossConfig().focal_gamma, LiteDetLossConfig().one_to_one_weight) == (2.0, 1.0)


def test_a_one_to_one_head_has_the_same_loss_with_one_anchor_for_each_object() -> None:
    (first, target), (second, _) = drawn(6, seed=3), drawn(6, seed=4)
    both = RawPredictions(*(torch.cat(parts, -2) for parts in zip(first, second, strict=True)))
    config = LiteDetLossConfig(one_to_one_weight=0.5, assigner=TaskAlignedConfig(anchors_per_object=4))
    losses = LiteDetLoss(config, CODER, one_to_one=True)(both, target)
    many = LiteDetLoss(config, CODER)(first, target)
    one = LiteDetLoss(replace(config, assigner=TaskAlignedConfig(anchors_per_object=1)), CODER)(second, target)
    assert one["positives"] < many["positives"] == losses["positives"]
    assert losses["loss_one_to_one"].item() == pytest.approx(0.5 * one["loss"].item(), rel=1e-6)
    assert losses["loss"].item() == pytest.approx(many["loss"].item() + 0.5 * one["loss"].item(), rel=1e-6)
    assert losses["loss_box"] == many["loss_box"]


def test_what_it_trains() -> None:
    config = LiteDetLossConfig()
    config.check(LiteDetConfig())
    assert config.fitted(LiteDetConfig()) == (config, "")
    fits = {"kind": "drawn", "score": "sigmoid", "background_column": False, "box_coder": lambda: CODER}
    config.check(SimpleNamespace(**fits))  # type: ignore[arg-type]
    for other in ({"score": "softmax"}, {"background_column": True}, {"box_coder": SSDBoxCoder}):
        with pytest.raises(ValueError, match="sigmoid scores and distributions, which a model of kind drawn does not"):
            config.check(SimpleNamespace(**fits | other))  # type: ignore[arg-type]


def test_weights_of_nothing_are_allowed() -> None:
    config = LiteDetLossConfig(
        classification_weight=0.0, box_weight=0.0, distribution_weight=0.0, one_to_one_weight=0.0, focal_gamma=1.0
    )
    losses = LiteDetLoss(config, CODER)(*drawn(6, seed=3))
    assert losses["loss"].item() == 0
    assert losses["loss_class"].item() > 0


def test_what_is_right_costs_nothing() -> None:
    box = torch.tensor([16.0, 16, 32, 32])
    logits = torch.full((1, len(ANCHORS), 2), -20.0)
    points = 0.5 * (ANCHORS[:, :2] + ANCHORS[:, 2:])
    logits[0, ((points > 16) & (points < 32)).all(-1), 1] = 20.0
    raw = RawPredictions(CODER.encode(box.expand(1, len(ANCHORS), 4), ANCHORS), logits, ANCHORS)
    target = Target(box[None, None], torch.tensor([[1]]), torch.tensor([[True]]))
    losses = LiteDetLoss(LiteDetLossConfig(), CODER)(raw, target)
    assert losses["positives"].item() == 5
    assert losses["loss_class"].item() == pytest.approx(0, abs=1e-4)
    assert losses["loss_box"].item() == pytest.approx(0, abs=1e-4)
    # A side between two bins is the two of them: what is left is their entropy. The points of stride 8 are at 1 and 3 half
    # strides from the sides, which are bins; the one of stride 16 is at 1 half stride, which is a bin too.
    assert losses["loss_distribution"].item() == pytest.approx(0, abs=1e-4)


def test_images_without_objects_teach_background() -> None:
    raw, _ = drawn(3, seed=0)
    none = Target(torch.zeros(4, 0, 4), torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0, dtype=torch.bool))
    logits, codes = raw.class_logits.requires_grad_(), raw.codes.requires_grad_()
    losses = LiteDetLoss(LiteDetLossConfig(), CODER)(RawPredictions(codes, logits, ANCHORS), none)
    assert losses["loss_box"].item() == losses["loss_distribution"].item() == 0
    losses["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad > 0).all()
    assert codes.grad is not None
    assert not codes.grad.any()


def test_gradients_are_finite_for_wild_predictions_and_thin_boxes() -> None:
    raw, target = drawn(4, seed=1)
    wild = RawPredictions((raw.codes * 1e4).requires_grad_(), (raw.class_logits * 1e3).requires_grad_(), ANCHORS)
    boxes = target.boxes.clone()
    boxes[..., 2] = boxes[..., 0]  # no width at all: a reader lets none of these through, the loss survives one
    loss = LiteDetLoss(LiteDetLossConfig(), CODER)(wild, target._replace(boxes=boxes))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert wild.codes.grad is not None
    assert wild.codes.grad.isfinite().all()
    assert wild.class_logits.grad is not None
    assert wild.class_logits.grad.isfinite().all()


def test_half_precision_predictions_are_taken_in_float32() -> None:
    raw, target = drawn(4, seed=1)
    half = RawPredictions(raw.codes.bfloat16(), raw.class_logits.bfloat16(), ANCHORS)
    losses = LiteDetLoss(LiteDetLossConfig(), CODER)(half, target)
    assert losses["loss"].dtype == torch.float32
    expected = LiteDetLoss(LiteDetLossConfig(), CODER)(raw, target)
    assert losses["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.03)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LiteDetLossConfig(box_weight=-1.0), "must not be negative"),
        (LiteDetLossConfig(focal_gamma=0.5), "focal_gamma must be at least 1, got 0.5"),
        (LiteDetLossConfig(assigner=TaskAlignedConfig(anchors_per_object=0)), "anchors_per_object must be at least 1"),
    ],
)
def test_configs_that_make_no_sense(config: LiteDetLossConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiteDetLoss(config, CODER)


def _loss_of_share(rank: int, world_size: int, file: str, results: "torch.multiprocessing.SimpleQueue[float]") -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    raw, target = drawn(6, seed=2)
    share = slice(rank, None, world_size)
    part = RawPredictions(raw.codes[share], raw.class_logits[share], ANCHORS)
    loss = LiteDetLoss(LiteDetLossConfig(), CODER)(part, Target(*(field[share] for field in target)))["loss"]
    results.put(loss.item())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_a_batch_average_to_the_whole(tmp_path: Path) -> None:
    # DDP averages gradients, so the mean of the processes' losses must be the loss of the whole batch.
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_loss_of_share, args=(2, f"{tmp_path}/rendezvous", results), nprocs=2)
    raw, target = drawn(6, seed=2)
    whole = LiteDetLoss(LiteDetLossConfig(), CODER)(raw, target)["loss"].item()
    assert (results.get() + results.get()) / 2 == pytest.approx(whole, rel=1e-5)
