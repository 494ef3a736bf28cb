"""What a dataset holds, in a table short enough to be read before a training."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from detection.data.coco import CocoIndex

_SIDES = (8, 16, 32, 64, 128, 256)  # pixels of the network's input
_NUM_CLASSES_SHOWN = 100


def describe(index: CocoIndex, input_size: tuple[int, int] | None = None) -> str:
    """A report of a dataset: images, boxes by class and by size, and the records that training leaves out.

    Args:
        index: the dataset.
        input_size: (height, width) of the network's input. With it, boxes are counted by the size at which the
            network will see them when images are stretched to the input; without it, by their size on disk.

    Returns:
        A few lines of text.
    """
    usable = index.usable
    per_image = np.add.reduceat(np.append(usable, False), index.offsets[:-1]) if len(index) else np.zeros(0, int)
    per_image = np.where(np.diff(index.offsets) > 0, per_image, 0)
    lines = [
        f"{index.path}: {len(index)} images, {int((per_image == 0).sum())} of them without objects, "
        f"{int(usable.sum())} boxes to learn from, {index.num_classes} classes",
        f"  left out: {int(index.crowd.sum())} crowds" + "".join(f"; {problem}" for problem in index.problems),
    ]
    if len(per_image):
        lines.append(f"  boxes per image: median {int(np.median(per_image))}, at most {int(per_image.max())}")
    sides = _sides(index, input_size)
    if len(sides):
        edges = [0, *_SIDES, np.inf]
        counts, _ = np.histogram(sides, edges)
        names = [
            f"< {_SIDES[0]}",
            *(f"{low}-{high}" for low, high in pairwise(_SIDES)),
            f">= {_SIDES[-1]}",
        ]
        shares = ", ".join(f"{name}: {count / len(sides):.0%}" for name, count in zip(names, counts, strict=True))
        where = f"at input size {input_size[1]}x{input_size[0]}" if input_size else "on disk"
        lines.append(f"  longer side in pixels {where}: {shares}")
    counts = np.bincount(index.labels[usable], minlength=index.num_classes)
    order = np.argsort(-counts, kind="stable")
    shown = ", ".join(f"{index.class_names[label]} {counts[label]}" for label in order[:_NUM_CLASSES_SHOWN])
    lines.append(f"  boxes by class: {shown}" + (", …" if len(order) > _NUM_CLASSES_SHOWN else ""))
    if empty := [index.class_names[label] for label in order if counts[label] == 0]:
        lines.append(f"  classes without a box: {', '.join(empty[:_NUM_CLASSES_SHOWN])}")
    return "\n".join(lines)


def _sides(index: CocoIndex, input_size: tuple[int, int] | None) -> NDArray[np.float64]:
    """The longer side of every usable box."""
    sides = index.xywh[:, 2:]
    if input_size is not None:
        height_width = np.repeat(index.sizes, np.diff(index.offsets), axis=0)
        sides = sides * (np.array(input_size) / height_width)[:, ::-1]
    longest: NDArray[np.float64] = sides[index.usable].max(axis=1, initial=0)
    return longest
