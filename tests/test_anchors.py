"""Anchors, with numbers worked out by hand. Run: pytest tests/test_anchors.py"""

import pytest
import torch

from backbones.features import FeatureSpec
from detection.boxes import xyxy_to_cxcywh
from detection.models.anchors import AnchorConfig, AnchorGenerator, stride_squares

SPECS = [
    FeatureSpec(576, 16),
    *(FeatureSpec(c, s) for c, s in ((1280, 32), (512, 64), (256, 128), (256, 256), (128, 512))),
]


def test_maps_and_counts_at_320() -> None:
    generator = AnchorGenerator(AnchorConfig(), SPECS)
    assert generator.grid_sizes((320, 320)) == [(20, 20), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
    assert generator.num_anchors == [3, 6, 6, 6, 6, 6]
    # 400 * 3 + (100 + 25 + 9 + 4 + 1) * 6
    assert generator((320, 320)).shape == (2034, 4)


def test_counts_at_300_and_off_the_square() -> None:
    generator = AnchorGenerator(AnchorConfig(), SPECS)
    assert generator.grid_sizes((300, 300)) == [(19, 19), (10, 10), (5, 5), (3, 3), (2, 2), (1, 1)]
    assert generator((300, 300)).shape == (1917, 4)
    assert generator.grid_sizes((96, 200)) == [(6, 13), (3, 7), (2, 4), (1, 2), (1, 1), (1, 1)]


def test_first_cell_by_hand() -> None:
    # At 320 the first map's scale is 0.2 = 64 px. Its reduced anchors: 32 square, then 64 at ratio 2 (90.51 x 45.25) and
    # at 1/2. The first cell's centre is 0.5 / 20 of 320 = 8 px.
    first = xyxy_to_cxcywh(AnchorGenerator(AnchorConfig(), SPECS)((320, 320))[:3])
    assert first.flatten().tolist() == pytest.approx(
        [8, 8, 32, 32, 8, 8, 90.5097, 45.2548, 8, 8, 45.2548, 90.5097], abs=1e-3
    )


def test_second_and_last_map_by_hand() -> None:
    # Second map: scale 0.35 = 112 px; the extra one sqrt(0.35 * 0.5) = 0.418330 = 133.8656 px. First centre 0.5 / 10 of 320.
    anchors = xyxy_to_cxcywh(AnchorGenerator(AnchorConfig(), SPECS)((320, 320)))
    second = anchors[1200:1206]
    assert torch.equal(second[:, :2], torch.full((6, 2), 16.0))
    assert second[:, 2].tolist() == pytest.approx([112, 158.3919, 79.1960, 193.9897, 64.6632, 133.8656], abs=1e-3)
    assert second[:, 3].tolist() == pytest.approx([112, 79.1960, 158.3919, 64.6632, 193.9897, 133.8656], abs=1e-3)
    # Last map: one cell, scale 0.95 = 304 px, the extra one sqrt(0.95 * 1) = 0.974679 = 311.8974 px.
    assert anchors[-6, 2].item() == pytest.approx(304, abs=1e-3)
    assert anchors[-1].tolist() == pytest.approx([160, 160, 311.8974, 311.8974], abs=1e-3)


def test_order_is_row_column_anchor() -> None:
    anchors = xyxy_to_cxcywh(AnchorGenerator(AnchorConfig(), SPECS)((320, 320)))
    assert anchors[3, :2].tolist() == [24, 8]  # the next column comes first
    assert anchors[60, :2].tolist() == [8, 24]  # then the next row, 20 cells of 3 anchors on


def test_a_ratio_is_a_ratio_in_pixels_off_the_square() -> None:
    anchors = xyxy_to_cxcywh(AnchorGenerator(AnchorConfig(), SPECS)((160, 320)))
    # The shorter side, 160, is the unit: 0.1 of it is 16 px in both directions; centres are shares of each side.
    assert anchors[0].tolist() == pytest.approx([8, 8, 16, 16])
    assert anchors[-1].tolist() == pytest.approx([160, 80, 155.9487, 155.9487], abs=1e-3)


def test_own_scales_without_the_reduced_map() -> None:
    config = AnchorConfig(scales=(0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05), reduce_first_map=False)
    generator = AnchorGenerator(config, SPECS)
    assert generator.num_anchors == [6] * 6
    assert generator((320, 320)).shape == (3234, 4)
    assert xyxy_to_cxcywh(generator((320, 320)))[0, 2].item() == pytest.approx(48)


def test_scales_of_few_maps() -> None:
    """Spaced evenly from the first to the last: two maps have just those, one has the first."""
    sides = [shapes[0][0] for shapes in AnchorGenerator(AnchorConfig(reduce_first_map=False), SPECS[:2]).shapes]
    assert sides == pytest.approx([0.2, 0.95])
    assert AnchorGenerator(AnchorConfig(), SPECS[:1]).shapes[0][0][0] == pytest.approx(0.1)  # half of it, reduced


def test_one_ratio_is_enough() -> None:
    assert AnchorGenerator(AnchorConfig(ratios=(2.0,)), SPECS).num_anchors == [3, 2, 2, 2, 2, 2]


def test_own_steps_between_the_centres() -> None:
    # A map of 4 x 2 cells and one of 2 x 1 for an input 64 wide and 32 high. The first: 0.3 of each side apart.
    config = AnchorConfig(centre_steps=(0.3, 0.5), reduce_first_map=False)
    centres = xyxy_to_cxcywh(AnchorGenerator(config, SPECS[:2])((32, 64)))[::6, :2]
    assert centres.flatten().tolist() == pytest.approx(
        [9.6, 4.8, 28.8, 4.8, 48, 4.8, 67.2, 4.8, 9.6, 14.4, 28.8, 14.4, 48, 14.4, 67.2, 14.4, 16, 8, 48, 8]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AnchorConfig(centre_steps=(0.1, 0.2)), r"6 feature maps need 6 centre_steps, got \(0.1, 0.2\)"),
        (AnchorConfig(scales=(0.1, 0, 0.2, 0.3, 0.4, 0.5, 0.6)), "anchor scales must be positive"),
        (AnchorConfig(min_scale=0.0), "0 < min_scale"),
        (AnchorConfig(ratios=(1.0,) * 33), r"1 to 32 of them, got \((1\.0, ){19}1\.0\)$"),  # the first 20
        (AnchorConfig(ratios=(1.0, 0.0)), "ratios must be positive"),
        (AnchorConfig(scales=(0.1, 0.2)), "6 feature maps need 7 anchor scales.*got 2"),
        (AnchorConfig(min_scale=0.9, max_scale=0.2), "min_scale <= max_scale, got min_scale=0.9"),
        (AnchorConfig(ratios=()), "ratios must be positive"),
        (AnchorConfig(ratios=(1.0, -2.0)), "ratios must be positive"),
    ],
)
def test_choices_that_make_no_sense(config: AnchorConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnchorGenerator(config, SPECS)


def test_squares_of_the_strides_lie_in_the_order_of_the_maps() -> None:
    squares = stride_squares((8, 16), (17, 24))
    assert len(squares) == 3 * 3 + 2 * 2  # rounded up
    assert squares[0].tolist() == [0, 0, 8, 8]
    assert squares[1].tolist() == [8, 0, 16, 8]  # the next column
    assert squares[3].tolist() == [0, 8, 8, 16]  # the next row
    assert squares[9].tolist() == [0, 0, 16, 16]
