import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from backbones.errors import UserError
from backbones.features import FeatureSpec
from detection.boxes import paired_iou
from detection.checks.fit import fit_detector, nearest_points, objects_at_input, point_ious, shape_ious, suggest
from detection.checks.sources import read_splits
from detection.checks.split import Split
from detection.cli.recipes import load_config
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.training.config import DetectionConfig


def split_of(folder: Path, boxes: list[list[float]], size: tuple[int, int] = (200, 400)) -> Split:
    """One image of (height, width) with these boxes, xywh."""
    content: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.jpg", "height": size[0], "width": size[1]}],
        "annotations": [{"id": n, "image_id": 1, "category_id": 1, "bbox": box} for n, box in enumerate(boxes, 1)],
        "categories": [{"id": 1, "name": "a"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return read_splits([folder / "a.json"])[0]


def test_nothing_to_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no object that training can use"):
        fit_detector(split_of(tmp_path, []), SSDLiteConfig())


def test_objects_at_input(tmp_path: Path) -> None:
    split = split_of(tmp_path, [[40, 20, 80, 40], [0, 0, 0, 5], [380, 180, 40, 40]])
    stretched = objects_at_input(split, SSDLiteConfig(input_size=(320, 320)))
    assert stretched.records.tolist() == [0, 2]  # the second has no area
    # x by 320 / 400, y by 320 / 200; the third is cut off at the edge
    assert stretched.boxes.tolist() == pytest.approx(np.array([[32, 32, 96, 96], [304, 288, 320, 320]]))
    letterboxed = objects_at_input(split, SSDLiteConfig(input_size=(320, 320), resize="letterbox"))
    # both by 0.8: 320 x 160 pixels, 80 of border above and below
    assert letterboxed.boxes[0].tolist() == pytest.approx([32, 96, 96, 128])


def test_nearest_points_by_hand() -> None:
    boxes = np.array([[0, 0, 4, 4], [17, 0, 19, 2], [90, 90, 140, 140]], np.float64)
    # points at 8, 24, 40: centres are (2, 2), (18, 1) and one beyond the last
    assert nearest_points(boxes, (16, 16), (3, 3)).tolist() == [[8, 8], [24, 8], [40, 40]]


@pytest.mark.parametrize("size", [(160, 160), (150, 260)])
def test_shape_ious_are_those_of_all_anchors(size: tuple[int, int]) -> None:
    generator = AnchorGenerator(
        AnchorConfig(min_scale=0.1), [FeatureSpec(8, 16), FeatureSpec(8, 32), FeatureSpec(8, 64)]
    )
    rng = np.random.default_rng(0)
    corners = rng.random((200, 2)) * size[::-1] * 0.8
    boxes = np.concatenate([corners, np.minimum(corners + 4 + rng.random((200, 2)) * 120, size[::-1])], axis=1)
    ious = shape_ious(boxes, generator, size)
    every = paired_iou(torch.tensor(boxes)[None].float(), generator(size))[0].numpy()
    start = column = 0
    for (rows, columns), shapes in zip(generator.grid_sizes(size), generator.shapes, strict=True):
        count = rows * columns * len(shapes)
        of_map = every[:, start : start + count].reshape(200, rows * columns, len(shapes)).max(axis=1)
        np.testing.assert_allclose(ious[:, column : column + len(shapes)], of_map, atol=1e-4)
        start, column = start + count, column + len(shapes)
    assert (start, column) == (every.shape[1], ious.shape[1])


def test_points_by_hand() -> None:
    config = LiteDetConfig(bins=8, first_bin=-0.5, input_size=(320, 320))
    boxes = np.array([[0, 0, 16, 16], [5, 5, 7, 7], [0, 0, 200, 16]], np.float64)
    ious, counts = point_ious(boxes, [8], config)
    # Points at 4, 12, ...: four in the first, none in the second; 25 x 2 in the third, which is wider than 2 * 6.5 * 8.
    assert counts[:, 0].tolist() == [4, 0, 50]
    assert ious[:2, 0].tolist() == pytest.approx([1, 1])
    # From the point at 100 or so, 52 to each side of 200.
    assert ious[2, 0] == pytest.approx(104 / 200)


def test_fit_of_both_kinds(tmp_path: Path) -> None:
    # At 320 x 320: a square of 64, and one of 2 pixels between the points of stride 8.
    split = split_of(tmp_path, [[32, 32, 64, 64], [9, 9, 2, 2]], (320, 320))
    ssd = fit_detector(split, SSDLiteConfig(anchors=AnchorConfig(min_scale=0.2, reduce_first_map=False)))
    assert ssd.reached.tolist() == [True, False]
    assert ssd.recall == 0.5
    assert [(name, count) for name, count, _ in ssd.by_size() if count] == [("0–8", 1), ("64–128", 1)]
    assert [choice.small for choice in ssd.choices] == [0.5, 0.5, 0.5, 0.5, 0.5]
    point = fit_detector(split, LiteDetConfig())
    assert point.reached.tolist() == [True, False]
    assert [row[0] for row in point.rows] == [8, 16, 32, 64]


def test_a_perfect_fit_suggests_nothing(tmp_path: Path) -> None:
    config = SSDLiteConfig(anchors=AnchorConfig(min_scale=0.2, reduce_first_map=False))
    boxes = [[16 * n + 8 - 32, 40, 64, 64] for n in range(3, 12)]
    suggestion = suggest(split_of(tmp_path, boxes, (320, 320)), config)
    assert (suggestion.overrides, suggestion.before, suggestion.after) == ([], 1.0, 1.0)


@pytest.mark.parametrize("recipe", ["finetune:ssdlite", "coco:ssdlite_mnv2_320", "finetune:litedet"])
def test_suggested_settings_are_taken_and_reach_what_they_say(tmp_path: Path, recipe: str) -> None:
    rng = np.random.default_rng(0)
    corners = rng.random((150, 2)) * 250
    sides = np.stack([rng.uniform(4, 9, 150), rng.uniform(20, 60, 150)], axis=1)  # long and small
    split = split_of(tmp_path, np.concatenate([corners, sides], axis=1).tolist(), (320, 320))
    config: DetectionConfig = load_config([recipe], "", DetectionConfig)
    suggestion = suggest(split, config.model)
    changed: DetectionConfig = load_config(
        [recipe, "--weights", "torchvision", *suggestion.overrides], "", DetectionConfig
    )
    changed.validate()
    assert fit_detector(split, config.model).recall == pytest.approx(suggestion.before)
    assert fit_detector(split, changed.model).recall == pytest.approx(suggestion.after)
    if recipe != "finetune:litedet":
        assert suggestion.after > suggestion.before + 0.2
        given = replace(changed.model.anchors, ratios=())  # type: ignore[attr-defined]
        assert given != replace(config.model.anchors, ratios=()) or changed.model.features != config.model.features  # type: ignore[attr-defined]
