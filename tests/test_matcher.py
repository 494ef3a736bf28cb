"""Matching of anchors and objects. Run: pytest tests/test_matcher.py"""

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.boxes import cxcywh_to_xyxy
from detection.training.assignment import MatcherConfig, SSDAssigner


def match_slowly(boxes: Tensor, anchors: Tensor, threshold: float, rounds: int) -> dict[int, int]:
    """One image: anchor -> object, written as the docstring of ``SSDAssigner`` says it."""
    result: dict[int, int] = {}
    iou = box_iou(boxes, anchors)
    for a in range(len(anchors)):
        best = max(range(len(boxes)), key=lambda m: (iou[m, a].item(), -m), default=None)
        if best is not None and iou[best, a] >= threshold:
            result[a] = best
    claimed: dict[int, int] = {}
    unserved = list(range(len(boxes)))
    for _ in range(rounds):
        bids: dict[int, list[tuple[float, int]]] = {}
        for m in unserved:
            free = [a for a in range(len(anchors)) if a not in claimed]
            a = max(free, key=lambda a: (iou[m, a].item(), -a))
            if iou[m, a] > 0:
                bids.setdefault(a, []).append((-iou[m, a].item(), m))
        for a, offers in bids.items():
            claimed[a] = min(offers)[1]
            unserved.remove(claimed[a])
    return result | claimed


def test_images_without_objects() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    none = SSDAssigner(MatcherConfig()).match(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), anchors)
    assert none.positive.shape == (2, 1)
    assert not none.positive.any()
    padding = SSDAssigner(MatcherConfig()).match(anchors.expand(2, 1, 4), torch.zeros(2, 1, dtype=torch.bool), anchors)
    assert not padding.positive.any()


def test_by_hand() -> None:
    # Anchors 10 x 10 in a row. Object 0 covers anchor 0 to 60 %. Object 1 covers anchor 2 with IoU 0.25 only: forced.
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10]])
    boxes = torch.tensor([[[0.0, 0, 6, 10], [20, 0, 25, 5]]])
    positive, objects = SSDAssigner(MatcherConfig()).match(boxes, torch.ones(1, 2, dtype=torch.bool), anchors)
    assert positive.tolist() == [[True, False, True]]
    assert objects[0, 0] == 0
    assert objects[0, 2] == 1
    positive, _ = SSDAssigner(MatcherConfig(forced_rounds=0)).match(boxes, torch.ones(1, 2, dtype=torch.bool), anchors)
    assert positive.tolist() == [[True, False, False]]


def test_an_overlap_at_the_threshold_is_enough() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    half = torch.tensor([[[0.0, 0, 5, 10]]])  # IoU 0.5
    positive, _ = SSDAssigner(MatcherConfig(forced_rounds=0)).match(half, torch.ones(1, 1, dtype=torch.bool), anchors)
    assert positive.tolist() == [[True]]


def test_the_defaults() -> None:
    config = MatcherConfig()
    assert (config.iou_threshold, config.forced_rounds) == (0.5, 3)  # SSD's threshold; the rounds are ours
    MatcherConfig(iou_threshold=1.0, forced_rounds=0).validate()


def test_two_objects_with_the_same_best_anchor_both_get_one() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [8, 0, 18, 10]])
    boxes = torch.tensor([[[0.0, 0, 8, 4], [2, 0, 10, 5]]])  # IoU with the first anchor 0.32 and 0.40
    valid = torch.ones(1, 2, dtype=torch.bool)
    positive, objects = SSDAssigner(MatcherConfig()).match(boxes, valid, anchors)
    assert positive.tolist() == [[True, False]]  # object 0 does not touch the second anchor
    assert objects[0, 0] == 1
    boxes[0, 0, 2] = 9  # now it does
    positive, objects = SSDAssigner(MatcherConfig()).match(boxes, valid, anchors)
    assert objects.tolist() == [[1, 0]]
    assert positive.all()


def test_of_two_equal_objects_one_takes_the_next_anchor() -> None:
    # Both bid 0.25 for the first anchor, which the first object gets; in the second round the other takes what is left.
    anchors = torch.tensor([[0.0, 0, 10, 10], [4, 0, 14, 10], [30, 0, 40, 10]])
    boxes = torch.tensor([[[0.0, 0, 5, 5], [0, 0, 5, 5]]])
    positive, objects = SSDAssigner(MatcherConfig()).match(boxes, torch.ones(1, 2, dtype=torch.bool), anchors)
    assert positive.tolist() == [[True, True, False]]  # and none claims a second time
    assert objects[0, :2].tolist() == [0, 1]


def test_a_forced_anchor_leaves_the_object_it_overlaps_more() -> None:
    # Both objects overlap the one anchor; the larger object reaches 0.81, the small one gets nothing better.
    anchors = torch.tensor([[0.0, 0, 10, 10]])
    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 9, 9]]])
    positive, objects = SSDAssigner(MatcherConfig()).match(boxes, torch.ones(1, 2, dtype=torch.bool), anchors)
    assert positive.tolist() == [[True]]
    assert objects.tolist() == [[1]]


@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_batch_equals_the_slow_loop(rounds: int) -> None:
    torch.manual_seed(rounds)
    anchors = cxcywh_to_xyxy(torch.rand(60, 4) * torch.tensor([100.0, 100, 40, 40]) + 5)
    boxes = cxcywh_to_xyxy(torch.rand(8, 6, 4) * torch.tensor([100.0, 100, 30, 30]) + 2)
    valid = torch.rand(8, 6) < 0.6
    positive, objects = SSDAssigner(MatcherConfig(forced_rounds=rounds)).match(boxes, valid, anchors)
    for b in range(8):
        kept = valid[b].nonzero().flatten()
        expected = match_slowly(boxes[b, kept], anchors, 0.5, rounds)
        found = {a: objects[b, a].item() for a in positive[b].nonzero().flatten().tolist()}
        assert found == {a: kept[m].item() for a, m in expected.items()}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MatcherConfig(iou_threshold=0.0), "iou_threshold must be in"),
        (MatcherConfig(iou_threshold=1.5), "iou_threshold must be in"),
        (MatcherConfig(forced_rounds=-1), "forced_rounds"),
    ],
)
def test_choices_that_make_no_sense(config: MatcherConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSDAssigner(config)
