"""The box code, with numbers worked out by hand. Run: pytest tests/test_box_coder.py"""

import math

import pytest
import torch

from detection.boxes import cxcywh_to_xyxy
from detection.models.box_coders import DistributionBoxCoder, SSDBoxCoder, log_softmax, softmax


def test_no_boxes() -> None:
    assert SSDBoxCoder().encode(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
    assert SSDBoxCoder().decode(torch.zeros(2, 0, 4), torch.zeros(0, 4)).shape == (2, 0, 4)
    assert SSDBoxCoder().code_size == 4


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
    codes = coder.encode(boxes, anchors)
    torch.testing.assert_close(coder.decode(codes, anchors), boxes, rtol=1e-4, atol=1e-3)
    # Anchors that have the batch's dimension too.
    torch.testing.assert_close(coder.encode(boxes, anchors.expand(3, 50, 4)), codes)
    torch.testing.assert_close(coder.decode(codes, anchors.expand(3, 50, 4)), coder.decode(codes, anchors))


def test_a_box_without_area_and_a_wild_prediction_stay_finite() -> None:
    anchor = torch.tensor([[0.0, 0, 10, 10]])
    thousandth = 5 * math.log(1e-3 / 10)  # of a pixel, which shorter sides count as
    code = SSDBoxCoder().encode(torch.tensor([[5.0, 5, 5, 5]]), anchor)
    assert code[0].tolist() == pytest.approx([0, 0, thousandth, thousandth], rel=1e-5)
    wild = SSDBoxCoder().decode(torch.full((1, 4), 1e4), anchor)
    assert wild.isfinite().all()
    assert (wild[0, 2] - wild[0, 0]).item() == pytest.approx(10 * 1000 / 16, rel=1e-4)


def test_a_distribution_by_hand() -> None:
    # Anchor 8 x 8 around (20, 20). Box from 20 - 2.5 * 8 = 0 and 20 - 8 = 12 to 20 + 0 and 20 + 6.9 * 8 = 75.2.
    coder = DistributionBoxCoder(8)
    anchor, box = torch.tensor([[16.0, 16, 24, 24]]), torch.tensor([[0.0, 12, 20, 75.2]])
    weights = coder.bin_weights(box, anchor)[0]
    assert weights[0].tolist() == pytest.approx([0, 0, 0.5, 0.5, 0, 0, 0, 0])
    assert weights[1].tolist() == pytest.approx([0, 1, 0, 0, 0, 0, 0, 0])
    assert weights[2].tolist() == pytest.approx([1, 0, 0, 0, 0, 0, 0, 0])
    assert weights[3].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0.1, 0.9], abs=1e-5)
    code = coder.encode(box, anchor)
    assert code.shape == (1, coder.code_size) == (1, 32)
    torch.testing.assert_close(coder.decode(code, anchor), box)
    # Logits of no preference: the mean of the bins, 3.5 strides on every side.
    assert coder.decode(torch.zeros(1, 32), anchor).tolist() == [[-8, -8, 48, 48]]
    assert DistributionBoxCoder(8, first=-0.5).decode(torch.zeros(1, 32), anchor).tolist() == [[-4, -4, 44, 44]]


def test_the_default_has_eight_bins() -> None:
    assert (DistributionBoxCoder().bins, DistributionBoxCoder().code_size, DistributionBoxCoder().first) == (8, 32, 0.0)


def test_a_side_beyond_the_bins_is_at_the_outermost() -> None:
    # 50 and 100 anchor sides to the left and right, none above and below the centre, with bins from 1 to 4.
    coder, anchor = DistributionBoxCoder(4, first=1.0), torch.tensor([[16.0, 16, 24, 24]])
    box = torch.tensor([[-380.0, 20, 820, 20]])
    assert coder.bin_weights(box, anchor)[0].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    # A weight of 0 has no logarithm: it counts as 1e-9.
    assert coder.encode(box, anchor)[0, :4].tolist() == pytest.approx([math.log(1e-9)] * 3 + [0])


def test_a_point_beside_a_small_object_can_describe_it() -> None:
    anchor, box = (
        torch.tensor([[16.0, 16, 24, 24]]),
        torch.tensor([[21.0, 22, 24, 25]]),
    )  # the centre (20, 20) is outside
    beside = DistributionBoxCoder(8, first=-0.5)
    torch.testing.assert_close(beside.decode(beside.encode(box, anchor), anchor), box)
    only_inside = DistributionBoxCoder(8)
    expected = torch.tensor([[20.0, 20, 24, 25]])  # as near as it comes
    torch.testing.assert_close(only_inside.decode(only_inside.encode(box, anchor), anchor), expected)


def test_distributions_of_a_batch_there_and_back() -> None:
    torch.manual_seed(0)
    anchors = cxcywh_to_xyxy(torch.cat((torch.rand(50, 2) * 100 + 20, torch.full((50, 2), 16.0)), -1))
    boxes = cxcywh_to_xyxy(torch.rand(3, 50, 4) * torch.tensor([30.0, 30, 60, 60]) + 60)
    near = (boxes - 0.5 * (anchors[:, :2] + anchors[:, 2:]).repeat(1, 2)).abs().amax(-1) < 6 * 16
    coder = DistributionBoxCoder(8, first=-1)
    decoded = coder.decode(coder.encode(boxes, anchors), anchors)
    each = anchors.expand(3, 50, 4)  # anchors of every image give the same
    assert torch.equal(coder.decode(coder.encode(boxes, each), each), decoded)
    inside = near & (decoded[..., :2] < decoded[..., 2:]).all(-1)
    centres = 0.5 * (anchors[:, :2] + anchors[:, 2:])
    inside &= ((centres >= boxes[..., :2] - 16) & (centres <= boxes[..., 2:] + 16)).all(-1)
    assert inside.sum() > 20
    torch.testing.assert_close(decoded[inside], boxes[inside], rtol=1e-4, atol=1e-3)


def test_wild_distributions_stay_finite_and_uncrossed() -> None:
    coder = DistributionBoxCoder(8, first=-0.5)
    anchors = torch.tensor([[0.0, 0, 8, 8]]).expand(100, 4)
    torch.manual_seed(0)
    decoded = coder.decode(torch.randn(100, 32) * 1e4, anchors)
    assert decoded.isfinite().all()
    assert (decoded[:, :2] <= decoded[:, 2:]).all()
    assert coder.decode(torch.zeros(2, 0, 32), torch.zeros(0, 4)).shape == (2, 0, 4)
    assert coder.encode(torch.tensor([[5.0, 5, 5, 5]]), anchors[:1]).isfinite().all()


@pytest.mark.parametrize("compiling", [False, True])
def test_softmax_over_a_short_dimension_is_torchs(compiling: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    logits = torch.randn(3, 5, 4, 8, dtype=torch.float64, requires_grad=True)
    for ours, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        assert ours(logits).shape == logits.shape
        torch.testing.assert_close(ours(logits), theirs(logits, -1))
        (gradient,) = torch.autograd.grad((ours(logits) ** 3).sum(), logits)
        (expected,) = torch.autograd.grad((theirs(logits, -1) ** 3).sum(), logits)
        torch.testing.assert_close(gradient, expected)
    assert softmax(torch.zeros(0, 4, 8)).shape == (0, 4, 8)
