"""The box code, with numbers worked out by hand. Run: pytest tests/test_box_coder.py"""

import math

import pytest
import torch

from detection.boxes import cxcywh_to_xyxy
from detection.models.box_coders import SSDBoxCoder


def test_no_boxes() -> None:
    assert SSDBoxCoder().encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert SSDBoxCoder().decode(torch.zeros(2, 0, 4), torch.zeros(0, 4)).shape == (2, 0, 4)


def test_encoding_by_hand() -> None:
    # Anchor 40 x 20 at (50, 50); box 80 x 10 at (54, 49): shift 4/40 * 10 = 1 and -1/20 * 10 = -0.5;
    # sides ln 2 * 5 = 3.4657 and ln 0.5 * 5 = -3.4657.
    anchor = cxcywh_to_xyxy(torch.tensor([[50.0, 50, 40, 20]]))
    box = cxcywh_to_xyxy(torch.tensor([[54.0, 49, 80, 10]]))
    code = SSDBoxCoder().encode(box, anchor)
    assert code[0].tolist() == pytest.approx([1, -0.5, 5 * math.log(2), -5 * math.log(2)], abs=1e-5)
    torch.testing.assert_close(SSDBoxCoder().decode(code, anchor), box)


def test_an_anchor_that_fits_is_all_zeros() -> None:
    anchor = torch.tensor([[10.0, 20, 30, 60]])
    assert SSDBoxCoder().encode(anchor, anchor).abs().max().item() == 0


def test_round_trip_of_a_batch() -> None:
    torch.manual_seed(0)
    anchors = cxcywh_to_xyxy(torch.rand(50, 4) * 100 + 20)
    boxes = cxcywh_to_xyxy(torch.rand(3, 50, 4) * 100 + 5)
    coder = SSDBoxCoder()
    torch.testing.assert_close(coder.decode(coder.encode(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-3)


def test_a_box_without_area_and_a_wild_prediction_stay_finite() -> None:
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    assert SSDBoxCoder().encode(torch.tensor([[5.0, 5, 5, 5]]), anchor).isfinite().all()
    wild = SSDBoxCoder().decode(torch.full((1, 4), 1e4), anchor)
    assert wild.isfinite().all()
    assert (wild[0, 2] - wild[0, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-4)
