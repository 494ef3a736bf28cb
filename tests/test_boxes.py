"""Box formats and overlaps. Run: pytest tests/test_boxes.py"""

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou_loss

from detection.boxes import box_area, cxcywh_to_xyxy, giou, paired_iou, xyxy_to_cxcywh


def test_no_boxes() -> None:
    empty = torch.zeros(0, 4)
    assert cxcywh_to_xyxy(empty).shape == (0, 4)
    assert xyxy_to_cxcywh(empty).shape == (0, 4)
    assert paired_iou(empty, torch.rand(3, 4)).shape == (0, 3)
    assert paired_iou(torch.zeros(2, 0, 4), torch.zeros(5, 4)).shape == (2, 0, 5)


def test_formats_by_hand() -> None:
    # A box from (10, 20) to (40, 60): centre (25, 40), 30 wide, 40 high.
    xyxy, cxcywh = torch.tensor([[10.0, 20, 40, 60]]), torch.tensor([[25.0, 40, 30, 40]])
    assert torch.equal(xyxy_to_cxcywh(xyxy), cxcywh)
    assert torch.equal(cxcywh_to_xyxy(cxcywh), xyxy)
    assert box_area(xyxy).item() == 1200
    # Any leading dimensions, or none.
    assert torch.equal(xyxy_to_cxcywh(xyxy.expand(2, 3, 4)), cxcywh.expand(2, 3, 4))
    assert torch.equal(cxcywh_to_xyxy(cxcywh.expand(2, 3, 4)), xyxy.expand(2, 3, 4))
    assert torch.equal(xyxy_to_cxcywh(xyxy[0]), cxcywh[0])
    assert torch.equal(cxcywh_to_xyxy(cxcywh[0]), xyxy[0])


def test_crossed_corners_have_no_area() -> None:
    assert box_area(torch.tensor([[10.0, 10, 5, 20]])).item() == 0


def test_iou_by_hand() -> None:
    # 10x10 boxes shifted by 5: they share 50 of 150. Touching boxes share nothing. A box inside another: 25 of 100.
    first = torch.tensor([[0.0, 0, 10, 10]])
    second = torch.tensor([[5.0, 0, 15, 10], [10, 0, 20, 10], [0, 0, 5, 5], [0, 0, 10, 10]])
    assert paired_iou(first, second)[0].tolist() == pytest.approx([1 / 3, 0, 0.25, 1])


def test_empty_boxes_overlap_nothing() -> None:
    point = torch.tensor([[3.0, 3, 3, 3]])
    assert paired_iou(point, point).item() == 0


def test_floors_of_the_denominators() -> None:
    # A square of side 1e-5 has the area 1e-10, a tenth of the IoU's floor of 1e-9.
    side = torch.tensor([[0.0, 0, 1e-5, 1e-5]])
    assert paired_iou(side, side).item() == pytest.approx(0.1)
    # GIoU's is 1e-7, for union and hull: 4e-8 over it, and two points whose hull is 4e-8.
    square = torch.tensor([[0.0, 0, 2e-4, 2e-4]])
    assert giou(square, square).item() == pytest.approx(0.4)
    assert giou(square[:, [0, 0, 0, 0]], square[:, [2, 2, 2, 2]]).item() == pytest.approx(-0.4)


def test_iou_of_a_batch_equals_torchvision_image_by_image() -> None:
    torch.manual_seed(0)
    first, second = (cxcywh_to_xyxy(torch.rand(3, n, 4) * 50) for n in (7, 11))
    expected = torch.stack([box_iou(a, b) for a, b in zip(first, second, strict=True)])
    torch.testing.assert_close(paired_iou(first, second), expected)
    torch.testing.assert_close(paired_iou(first, second[0])[2], box_iou(first[2], second[0]))


def test_giou_is_torchvisions() -> None:
    torch.manual_seed(0)
    first, second = (cxcywh_to_xyxy(torch.rand(3, 40, 4) * 20 + 1) for _ in range(2))
    expected = 1 - generalized_box_iou_loss(first, second)
    torch.testing.assert_close(giou(first, second), expected)
    empty = torch.zeros(1, 4, requires_grad=True)
    giou(empty, torch.zeros(1, 4)).sum().backward()
    assert empty.grad is not None
    assert empty.grad.isfinite().all()
