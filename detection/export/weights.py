"""Weights of convolutions in eight bits, such that no processor's 16-bit sums overflow.

Processors with AVX2 and no VNNI multiply bytes in pairs: activations of 0 to 255 with weights of -127 to 127. The sum of two
products has 16 bits, and what is larger is cut off in silence. Weights of seven bits never come that far, which quantisers call
a reduced range, but they are rounded twice as coarsely. Here a channel gets as many steps as do it most good, and of pairs that
would come too far both weights are made a little smaller. What that takes from the mean of an output its bias gives back
(bias correction: Nagel et al. 2019, arXiv 1906.04721, section 4.2).
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MOST, LEAST = 127, 64
"""Steps from zero to a channel's largest weight: all that eight bits have, and as many as any pair bears."""
LIMIT = 128
"""The largest sum of two weights: 128 * 255 is below 2 ** 15, 129 * 255 is not."""


class EightBits(NamedTuple):
    """Weights of a convolution and how they are written in eight bits.

    Attributes:
        weights: float32 [C, D, H, W], near the given ones: ``weights / scales`` are whole numbers.
        scales: float32 [C], above zero.
    """

    weights: NDArray[np.float32]
    scales: NDArray[np.float32]


def in_eight_bits(weights: NDArray[np.float32], groups: int = 1) -> EightBits:
    """Rounds weights, each channel to the number of steps that has the smallest squared error.

    Of a 1x1 convolution the channels that it reads go in pairs, the first with the second, the third with the fourth. Of larger
    kernels the order depends on the processor, and any two weights count as a pair. Depthwise convolutions are added up in
    32 bits, and all steps are theirs.

    Args:
        weights: [C, D, H, W], D the channels that each of the C reads.
        groups: of the convolution; a depthwise one has C groups of one channel.
    """
    channels, read, *kernel = weights.shape
    flat = weights.reshape(channels, -1)
    largest = np.abs(flat).max(1, keepdims=True)
    largest[largest == 0] = 1  # of a channel of zeros
    depthwise = read == 1 and groups == channels > 1
    best = np.full((channels, 1), np.inf, np.float32)
    values, scales = np.zeros_like(flat), np.ones_like(largest)
    for steps in [MOST] if depthwise else range(LEAST, MOST + 1):
        scale = largest / np.float32(steps)
        rounded = np.rint(flat / scale)
        fits = np.ones((channels, 1), bool)
        if kernel == [1, 1]:
            rounded = _trimmed(rounded)
        elif not depthwise:
            fits = _any_two(rounded) <= LIMIT
        error = ((rounded * scale - flat) ** 2).sum(1, keepdims=True)
        better = fits & (error < best)
        best, values, scales = (
            np.where(better, new, old) for new, old in ((error, best), (rounded * scale, values), (scale, scales))
        )
    return EightBits(values.reshape(weights.shape), scales[:, 0])


def mean_loss(
    weights: NDArray[np.float32], rounded: NDArray[np.float32], means: NDArray[np.float32]
) -> NDArray[np.float32]:
    """What a convolution's outputs lose on average by rounded weights; the edges of the image count as its middle.

    Args:
        weights, rounded: [C, D, H, W], D the channels that each of the C reads.
        means: [G * D], of the channels that the convolution reads, G the number of its groups.

    Returns:
        float32 [C].
    """
    channels, read = weights.shape[:2]
    groups = len(means) // read
    of_each = means.reshape(groups, read).repeat(channels // groups, 0)  # [C, D]
    loss: NDArray[np.float32] = ((weights - rounded).sum((2, 3)) * of_each).sum(1).astype(np.float32)
    return loss


def _trimmed(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """Pairs of neighbours whose sum is beyond ``LIMIT``, made smaller by equal parts. Whole numbers [C, K]."""
    count = weights.shape[1]
    pairs = np.pad(weights, ((0, 0), (0, count % 2))).reshape(len(weights), -1, 2)
    total = pairs.sum(2)
    excess = total - np.clip(total, -LIMIT, LIMIT)
    half = np.trunc(excess / 2)
    trimmed: NDArray[np.float32] = pairs - np.stack((excess - half, half), 2)
    return trimmed.reshape(len(weights), -1)[:, :count]


def _any_two(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest sum of two weights of a channel, whichever, without its sign. [C, K] -> [C, 1]."""
    ordered = np.sort(weights, 1)
    most: NDArray[np.float32] = np.maximum(ordered[:, -2:].sum(1), -ordered[:, :2].sum(1))
    return most[:, None]
