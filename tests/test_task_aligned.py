"""Task-aligned assignment against a slow loop that a person can read. Run: pytest tests/test_task_aligned.py"""

import math

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_iou

from detection.boxes import cxcywh_to_xyxy
from detection.models.anchors import stride_squares
from detection.models.box_coders import DistributionBoxCoder
from detection.structures import RawPredictions, Target
from detection.training.assignment import Assignment
from detection.training.task_aligned import TaskAlignedAssigner, TaskAlignedConfig

ANCHORS = stride_squares((8, 16, 32), (64, 64))  # 64 + 16 + 4 points
CODER = DistributionBoxCoder(8, -0.5)


def assign_slowly(
    config: TaskAlignedConfig, boxes: Tensor, logits: Tensor, objects: Tensor, labels: Tensor, anchors: Tensor
) -> dict[int, tuple[int, float]]:
    """One image: anchor -> (object, quality), written as the docstring of ``TaskAlignedAssigner`` says it."""
    finest = min(float(x2 - x1) for x1, _, x2, _ in anchors)
    iou, scores = box_iou(objects, boxes), logits.sigmoid()
    points = (anchors[:, :2] + anchors[:, 2:]) / 2

    def closeness(m: int, a: int) -> float:
        centre = (objects[m, :2] + objects[m, 2:]) / 2
        return 1 / (1 + float((points[a] - centre).abs().max()) / finest)

    def alignment(m: int, a: int) -> float:
        return float(scores[a, labels[m]]) ** config.score_power * max(float(iou[m, a]), 1e-3) ** config.iou_power

    def inside(m: int, a: int) -> bool:
        centre = (objects[m, :2] + objects[m, 2:]) / 2
        half = ((objects[m, 2:] - objects[m, :2]) / 2).clamp(min=config.least_side * finest / 2)
        return bool(((points[a] - centre).abs() < half).all())

    wanted: dict[int, list[int]] = {}
    for m in range(len(objects)):
        candidates = [a for a in range(len(anchors)) if inside(m, a)]
        candidates.sort(key=lambda a: -(math.log(alignment(m, a)) + 1e-3 * closeness(m, a)))
        for a in candidates[: config.anchors_per_object]:
            wanted.setdefault(a, []).append(m)
    owner = {a: max(rivals, key=lambda m: float(iou[m, a]) + 1e-3 * closeness(m, a)) for a, rivals in wanted.items()}
    result = {}
    for a, m in owner.items():
        own = [b for b in owner if owner[b] == m]
        best_iou = max(config.least_quality, max(float(iou[m, b]) for b in own))
        result[a] = (m, alignment(m, a) / max(alignment(m, b) for b in own) * best_iou)
    return result


def drawn(num_objects: int, seed: int, size: float = 30.0) -> tuple[RawPredictions, Target]:
    torch.manual_seed(seed)
    raw = RawPredictions(torch.randn(4, len(ANCHORS), 32) * 2, torch.randn(4, len(ANCHORS), 3) - 3, ANCHORS)
    boxes = cxcywh_to_xyxy(torch.rand(4, num_objects, 4) * torch.tensor([60.0, 60, size, size]) + 2)
    valid = torch.rand(4, num_objects) < 0.7
    valid[2] = False  # an image without objects
    labels = torch.randint(0, 3, (4, num_objects))
    return raw, Target(boxes.clamp(0, 64) * valid[..., None], labels * valid, valid)


def owners(assignment: Assignment, image: int) -> dict[int, int]:
    positive = assignment.positive[image].nonzero().flatten().tolist()
    return {a: int(assignment.objects[image, a]) for a in positive}


@pytest.mark.parametrize("num_objects", [1, 6, 40])  # the last are more than the points can serve
@pytest.mark.parametrize("size", [3.0, 40.0])
@pytest.mark.parametrize("config", [TaskAlignedConfig(), TaskAlignedConfig(anchors_per_object=3, score_power=0.5)])
def test_batch_equals_the_slow_loop(num_objects: int, size: float, config: TaskAlignedConfig) -> None:
    raw, target = drawn(num_objects, seed=num_objects, size=size)
    found = TaskAlignedAssigner(config, CODER)(raw, target)
    boxes = CODER.decode(raw.codes, ANCHORS)
    for b in range(4):
        kept = target.valid[b].nonzero().flatten()
        expected = assign_slowly(
            config, boxes[b], raw.class_logits[b], target.boxes[b, kept], target.labels[b, kept], ANCHORS
        )
        assert owners(found, b) == {a: int(kept[m]) for a, (m, _) in expected.items()}
        for a, (_, quality) in expected.items():
            assert float(found.quality[b, a]) == pytest.approx(quality, rel=1e-3, abs=1e-6)
        assert not found.quality[b, ~found.positive[b]].any()


def test_images_without_objects() -> None:
    raw, target = drawn(3, seed=0)
    none = Target(torch.zeros(4, 0, 4), torch.zeros(4, 0, dtype=torch.long), torch.zeros(4, 0, dtype=torch.bool))
    for objects in (none, target._replace(valid=torch.zeros(4, 3, dtype=torch.bool))):
        found = TaskAlignedAssigner(TaskAlignedConfig(), CODER)(raw, objects)
        assert not found.positive.any()
        assert not found.quality.any()
        assert found.objects.shape == (4, len(ANCHORS))


def one_image(boxes: list[list[float]], labels: list[int]) -> Target:
    return Target(torch.tensor([boxes]), torch.tensor([labels]), torch.ones(1, len(labels), dtype=torch.bool))


def predicting(boxes: Tensor, logits: Tensor | None = None) -> RawPredictions:
    """Every anchor predicts the box that it is given, as well as its bins allow."""
    logits = torch.full((1, len(ANCHORS), 3), -2.0) if logits is None else logits
    return RawPredictions(CODER.encode(boxes.expand(1, len(ANCHORS), 4), ANCHORS), logits, ANCHORS)


def test_by_hand() -> None:
    # An object of 16 x 16 px holds four points of stride 8 and one of stride 16. All predict it exactly; one of them is
    # surer of its class than the others, and its quality is 1, that of the others s / s_max.
    box = [16.0, 16, 32, 32]
    logits = torch.full((1, len(ANCHORS), 3), -2.0)
    point = 2 * 8 + 3  # row 2, column 3 of the finest map
    logits[0, point, 1] = 2.0
    found = TaskAlignedAssigner(TaskAlignedConfig(), CODER)(
        predicting(torch.tensor(box), logits), one_image([box], [1])
    )
    positive = found.positive[0].nonzero().flatten().tolist()
    assert positive == [2 * 8 + 2, 2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3, 64 + 1 * 4 + 1]
    assert float(found.quality[0, point]) == pytest.approx(1, abs=1e-4)
    share = 1 / (1 + math.exp(2)) / (1 / (1 + math.exp(-2)))
    assert float(found.quality[0, positive[0]]) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize("box", [[20.5, 20.5, 23, 23], [0.0, 0, 1, 1], [63.0, 40, 64, 41], [31.9, 31.9, 32.1, 32.1]])
def test_an_object_between_the_points_gets_some(box: list[float]) -> None:
    untrained = predicting(cxcywh_to_xyxy(torch.tensor([32.0, 32, 20, 20])))
    found = TaskAlignedAssigner(TaskAlignedConfig(), CODER)(untrained, one_image([box], [0]))
    assert found.positive.any()
    assert float(found.quality.max()) >= 0.05 - 1e-6  # it teaches, although no box overlaps it
    points = 0.5 * (ANCHORS[found.positive[0], :2] + ANCHORS[found.positive[0], 2:])
    assert (points - torch.tensor([box[:2]])).abs().max() <= 10
    strict = TaskAlignedAssigner(TaskAlignedConfig(least_side=0), CODER)(untrained, one_image([box], [0]))
    assert not strict.positive.any()


def test_closeness_and_inside_by_hand() -> None:
    # Points (12, 4), (20, 4) of stride 8 and (24, 16) of stride 32. The object's centre is (16, 4), 8 wide and 2 high; at least
    # two anchors of the finest map a side: 16 x 16, from (8, -4) to (24, 12).
    anchors = torch.tensor([[8.0, 0, 16, 8], [16, 0, 24, 8], [8, 0, 40, 32]])
    boxes = torch.tensor([[[12.0, 3, 20, 5]]])
    inside, closeness = TaskAlignedAssigner(TaskAlignedConfig(), CODER)._places(boxes, anchors)
    assert inside.tolist() == [[[True, True, False]]]
    # The larger of both distances, 4, 4 and 12, in anchors of the finest map: 1 / (1 + 4 / 8) and 1 / (1 + 12 / 8).
    assert closeness.flatten().tolist() == pytest.approx([2 / 3, 2 / 3, 0.4])
    # On the edge is outside.
    edge, _ = TaskAlignedAssigner(TaskAlignedConfig(least_side=0.0), CODER)._places(
        torch.tensor([[[12.0, 0, 28, 8]]]), anchors
    )
    assert edge.tolist() == [[[False, True, False]]]


def assigned(config: TaskAlignedConfig, boxes: Tensor, target: Target) -> Assignment:
    """Every anchor predicts exactly the box that it is given, all with the same scores."""
    boxes, logits = boxes.expand(1, len(ANCHORS), 4), torch.full((1, len(ANCHORS), 3), -2.0)
    return TaskAlignedAssigner(config, CODER).assign(boxes, logits, target, ANCHORS)


def test_between_equals_the_nearer_wins() -> None:
    # Every anchor predicts a box that touches no object, with the same scores: the place alone decides.
    far = torch.tensor([56.0, 56, 64, 64])
    found = assigned(TaskAlignedConfig(anchors_per_object=1), far, one_image([[0.0, 0, 26, 26]], [0]))
    assert owners(found, 0) == {1 * 8 + 1: 0}  # (12, 12) is the nearest to (13, 13)
    assert float(found.quality[0, 9]) == pytest.approx(0.05)
    # Both objects hold the points of the left top; (4, 4) is nearer to the centre of the second.
    both = assigned(TaskAlignedConfig(), far, one_image([[0.0, 0, 16, 16], [0, 0, 9, 9]], [0, 0]))
    assert owners(both, 0)[0] == 1
    assert owners(both, 0)[1 * 8 + 1] == 0


@pytest.mark.parametrize(("half", "owner"), [(104.51, 1), (104.558, 0)])
def test_closeness_counts_a_thousandth_of_the_overlap(half: float, owner: int) -> None:
    # The anchor at (4, 4), 8 wide, predicts 100 x 100. The first object holds it all, 192 x 192 around (4, 4): IoU 0.271267,
    # closeness 1. The second too, 176 wide around (12, 4): closeness 1 / (1 + 8 / 8), half less, so that it needs an IoU
    # that is more than 0.0005 higher. It is 0.000564 or 0.00044 higher.
    predicted, anchors = torch.tensor([[[0.0, 0, 100, 100]]]), torch.tensor([[0.0, 0, 8, 8]])
    target = one_image([[-92.0, -92, 100, 100], [-76, 4 - half, 100, 4 + half]], [0, 0])
    found = TaskAlignedAssigner(TaskAlignedConfig(), CODER).assign(predicted, torch.zeros(1, 1, 3), target, anchors)
    assert owners(found, 0) == {0: owner}


def test_an_overlap_below_the_least_counts_as_that() -> None:
    # u is 0 for one anchor and 1 for the others: its share is (0.001 / 1)^beta, here 0.001.
    box = torch.tensor([16.0, 16, 32, 32])
    boxes = box.repeat(len(ANCHORS), 1)
    boxes[2 * 8 + 2] = torch.tensor([50.0, 50, 60, 60])
    config = TaskAlignedConfig(iou_power=1.0, score_power=0.0, least_quality=0.0)
    found = assigned(config, boxes, one_image([box.tolist()], [0]))
    assert float(found.quality[0, 2 * 8 + 3]) == pytest.approx(1)
    assert float(found.quality[0, 2 * 8 + 2]) == pytest.approx(1e-3, rel=1e-3)


def test_labels_begin_at_the_first_column() -> None:
    box = [16.0, 16, 32, 32]
    logits = torch.full((1, len(ANCHORS), 3), -2.0)
    logits[0, 2 * 8 + 3, 2] = 2.0  # column 2 is label 1 where column 0 is the background
    raw = predicting(torch.tensor(box), logits)
    found = TaskAlignedAssigner(TaskAlignedConfig(anchors_per_object=1), CODER, first_column=1)(
        raw, one_image([box], [1])
    )
    assert owners(found, 0) == {2 * 8 + 3: 0}
    assert TaskAlignedAssigner(TaskAlignedConfig(), CODER).first_column == 0


def test_the_defaults_are_those_of_the_paper() -> None:
    # TOOD, section 4.1: alpha 1, beta 6, 13 anchors. The least side and quality are ours.
    config = TaskAlignedConfig()
    assert (config.score_power, config.iou_power, config.anchors_per_object) == (1.0, 6.0, 13)
    assert (config.least_side, config.least_quality) == (2.0, 0.05)


def test_choices_at_the_edge_of_sense() -> None:
    # Without powers all are equals: each positive has the highest IoU as its quality. One anchor, no least quality.
    box, half = [16.0, 16, 32, 32], torch.tensor([16.0, 16, 32, 24])
    config = TaskAlignedConfig(anchors_per_object=1, score_power=0.0, iou_power=0.0, least_side=0.0, least_quality=0.0)
    found = assigned(config, half, one_image([box], [0]))
    assert found.quality[found.positive].tolist() == pytest.approx([0.5])
    found = assigned(TaskAlignedConfig(least_quality=1.0), half, one_image([box], [0]))
    assert found.quality[found.positive].tolist() == pytest.approx([1.0] * 5)


def test_an_object_covered_by_another_keeps_the_anchors_that_fit_it() -> None:
    # Points near the middle predict the inner object, all others the outer one.
    outer, inner = [4.0, 4, 60, 60], [24.0, 24, 40, 40]
    points = 0.5 * (ANCHORS[:, :2] + ANCHORS[:, 2:])
    middle = ((points - 32).abs() < 8).all(-1)
    boxes = torch.where(middle[:, None], torch.tensor(inner), torch.tensor(outer))
    found = TaskAlignedAssigner(TaskAlignedConfig(), CODER)(predicting(boxes), one_image([outer, inner], [0, 0]))
    ours = owners(found, 0)
    assert {a for a, m in ours.items() if m == 1} == set(middle.nonzero().flatten().tolist())
    assert 0 in ours.values()


def test_the_same_box_twice_goes_to_the_first() -> None:
    box = [16.0, 16, 32, 32]
    found = TaskAlignedAssigner(TaskAlignedConfig(), CODER)(
        predicting(torch.tensor(box)), one_image([box, box], [0, 0])
    )
    assert set(owners(found, 0).values()) == {0}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TaskAlignedConfig(anchors_per_object=0), "anchors_per_object must be at least 1, got 0"),
        (TaskAlignedConfig(iou_power=-1.0), "must not be negative, got 1.0 and -1.0"),
        (TaskAlignedConfig(score_power=-1.0), "must not be negative, got -1.0 and 6.0"),
        (TaskAlignedConfig(least_side=-1.0), "least_side must not be negative"),
        (TaskAlignedConfig(least_quality=2.0), r"least_quality must be in \[0, 1\], got 2.0"),
    ],
)
def test_choices_that_make_no_sense(config: TaskAlignedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskAlignedAssigner(config, CODER)
