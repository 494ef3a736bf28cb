"""Weights in eight bits whose products no processor's 16-bit sums overflow."""

import numpy as np
import pytest

from detection.export.weights import in_eight_bits, mean_loss


def rounded(weights: np.ndarray, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers [C, D, H, W] of given weights, and the scales; the weights are those whole numbers times the scales."""
    made = in_eight_bits(weights.astype(np.float32), groups)
    assert made.weights.shape == weights.shape
    assert made.weights.dtype == made.scales.dtype == np.float32
    assert (made.scales > 0).all()
    numbers = made.weights / made.scales[:, None, None, None]
    assert numbers == pytest.approx(np.rint(numbers), abs=1e-4)
    return np.rint(numbers).astype(np.int64), made.scales


def channel(*weights: float) -> np.ndarray:
    """A 1x1 convolution of one channel."""
    return np.array(weights).reshape(1, -1, 1, 1)


def test_no_weights_but_zero() -> None:
    numbers, _ = rounded(np.zeros((2, 3, 1, 1)))
    assert not numbers.any()


def test_pairs_by_hand() -> None:
    # 127 and 1 may stand together: 128 * 255 = 32640 has 16 bits.
    numbers, scales = rounded(channel(127, 1, 0, 0))
    assert (numbers.ravel().tolist(), scales.tolist()) == ([127, 1, 0, 0], [1.0])
    # So may two of different signs, and two of different pairs.
    assert rounded(channel(127, -126))[0].ravel().tolist() == [127, -126]
    assert rounded(channel(0, 127, 126, 1, 125))[0].ravel().tolist() == [0, 127, 126, 1, 125]
    # 127 and 3 may not. 85 steps make them 85 and 2 (2.008), which is nearer than 126 and 2 of 127 steps.
    numbers, scales = rounded(channel(127, 3))
    assert numbers.ravel().tolist() == [85, 2]
    assert scales.tolist() == pytest.approx([127 / 85])
    # Two of the largest need the coarsest steps.
    numbers, scales = rounded(channel(-1, -1))
    assert (numbers.ravel().tolist(), scales.tolist()) == ([-64, -64], [1 / 64])


def test_one_pair_among_many_is_made_smaller() -> None:
    """Fewer steps would fit it, and round sixty others; so it gives way, by equal parts."""
    others = np.stack((np.arange(1, 128, 2), np.zeros(64)), 1).ravel()
    numbers, scales = rounded(channel(127, 3, *others))
    assert scales.tolist() == [1.0]
    assert numbers.ravel()[:2].tolist() == [126, 2]
    assert numbers.ravel()[2:].tolist() == others.tolist()
    assert (rounded(-channel(127, 3, *others))[0] == -numbers).all()


def test_depthwise_channels_have_all_steps_and_each_channel_its_own() -> None:
    weights = np.random.default_rng(0).normal(size=(4, 1, 3, 3)) * np.array([1, 10, 1e-6, 1e3]).reshape(4, 1, 1, 1)
    numbers, scales = rounded(weights, groups=4)
    assert scales == pytest.approx(np.abs(weights).max((1, 2, 3)) / 127)
    assert (np.abs(numbers).max((1, 2, 3)) == 127).all()
    # One input channel is not depthwise: its nine weights are added in pairs, as those of any other.
    assert np.sort(rounded(weights, groups=1)[0].reshape(4, -1), 1)[:, -2:].sum(1).max() <= 128


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_two_products_have_16_bits(kernel: int) -> None:
    weights = np.random.default_rng(0).normal(size=(64, 33, kernel, kernel))
    weights[:32, 4:6] = weights[:32].max() + np.arange(2).reshape(1, 2, 1, 1)  # a pair of outliers
    numbers, scales = rounded(weights)
    assert np.abs(numbers).max() > (100 if kernel == 1 else 70)
    assert np.abs(numbers).max() <= 127
    flat = numbers.reshape(64, -1)
    if kernel == 1:
        pairs = np.pad(flat, ((0, 0), (0, 1))).reshape(64, -1, 2)
    else:  # in whichever order
        ordered = np.sort(flat, 1)
        pairs = np.stack((ordered[:, :2], ordered[:, -2:]), 1)
    # The activations that make most of it: 255 where the weights are positive, 0 elsewhere; and the other way round.
    assert 255 * np.maximum(pairs, 0).sum(2).max() < 2**15
    assert 255 * np.minimum(pairs, 0).sum(2).min() >= -(2**15)
    # And no channel is further off than with seven bits.
    seven = np.abs(weights).max((1, 2, 3)) / 64
    coarse = np.rint(weights / seven[:, None, None, None]) * seven[:, None, None, None]
    error = ((numbers * scales[:, None, None, None] - weights) ** 2).sum((1, 2, 3))
    assert (error <= ((coarse - weights) ** 2).sum((1, 2, 3)) * 1.001).all()


def test_what_rounding_takes_from_the_mean_by_hand() -> None:
    weights, means = np.array([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 2, 1, 1), np.array([10.0, 100.0], np.float32)
    rounded = np.array([[0.5, 2.0], [3.0, 4.25]]).reshape(2, 2, 1, 1)
    assert mean_loss(weights, rounded, means).tolist() == [5, -25]
    # Depthwise: each channel reads its own, and the taps of the kernel add up.
    taps = np.ones((2, 1, 3, 3))
    assert mean_loss(taps, taps - 0.125, means).tolist() == [11.25, 112.5]
    # Two groups of two channels, which give one each.
    assert mean_loss(weights, rounded, np.array([1, 1, 10, 8], np.float32)).tolist() == [0.5, -2]
    assert mean_loss(weights, weights, means).tolist() == [0, 0]
