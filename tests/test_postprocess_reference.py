"""One-pass post-processing against an exhaustive loop over classes. Run: pytest tests/test_postprocess_reference.py

The loop sees every (anchor, class) pair: for each class alone it takes all anchors above the threshold, suppresses, clips
and keeps the best. Post-processing sees the best 1,000 pairs of an image. The two must agree in AP.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from shared_data import SHARED, needs_shared
from torch import Tensor

from backbones.features import FeatureSpec
from detection.boxes import paired_iou
from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import CocoEvaluator
from detection.models.anchors import AnchorConfig, AnchorGenerator
from detection.models.box_coders import SSDBoxCoder
from detection.postprocess import Postprocess, PostprocessConfig
from detection.structures import Detections, RawPredictions

STRIDES = (16, 32, 64, 128, 256, 512)


def make_anchors(side: int) -> Tensor:
    return AnchorGenerator(AnchorConfig(), [FeatureSpec(1, stride) for stride in STRIDES])((side, side))


def greedy_nms(boxes: NDArray[np.float64], scores: NDArray[np.float64], threshold: float, limit: int) -> list[int]:
    """Take the best box, drop what overlaps it too much, and so on."""
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    left = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while left.size and len(kept) < limit:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        corner = np.maximum(boxes[best, :2], boxes[left, :2])
        overlap = (np.minimum(boxes[best, 2:], boxes[left, 2:]) - corner).clip(0).prod(1)
        left = left[overlap / (areas[best] + areas[left] - overlap) <= threshold]
    return kept


def exhaustive(
    raw: RawPredictions, scores: Tensor, sizes: Tensor, config: PostprocessConfig, limit: int = 100
) -> list[Detections]:
    """The reference, for images stretched to the input of side ``raw``'s anchors; COCO looks at 100 a class at most."""
    side = 2 * float(raw.anchors.mean())  # anchors lie symmetrically about the centre of the input
    found = []
    for encodings, of_image, size in zip(raw.codes, scores, sizes, strict=True):
        scale = size.flip(-1).repeat(2).double().numpy() / side
        all_boxes = SSDBoxCoder().decode(encodings, raw.anchors).double().numpy() * scale
        clipped = np.clip(all_boxes, 0, size.flip(-1).repeat(2).numpy())
        rows = []
        for label, of_class in enumerate(of_image.T.double().numpy()):
            usable = np.flatnonzero(of_class > config.score_threshold)
            kept = usable[greedy_nms(all_boxes[usable], of_class[usable], config.nms_threshold, limit)]
            kept = kept[(clipped[kept, 2:] > clipped[kept, :2]).all(1)]
            rows += [(*clipped[i], of_class[i], label) for i in kept]
        table = torch.tensor(sorted(rows, key=lambda row: -row[4])).reshape(-1, 6)
        found.append(Detections(boxes=table[:, :4].float(), scores=table[:, 4].float(), labels=table[:, 5].long()))
    return found


def average_precision(index: CocoIndex, image_ids: list[int], detections: list[Detections]) -> float:
    evaluator = CocoEvaluator(index)
    evaluator.update(image_ids, detections)
    return evaluator.compute().figures["AP"]


def whole(sizes: Tensor, side: int) -> Tensor:
    """Placements of images stretched to the input."""
    scales = side / sizes.flip(-1)
    return torch.cat((scales, torch.zeros_like(scales)), 1)


def draw(folder: Path, num_images: int, num_classes: int, side: int) -> tuple[CocoIndex, RawPredictions, Tensor]:
    """Objects, and predictions as a trained network has them: sure near objects, a long tail of low scores everywhere."""
    torch.manual_seed(0)
    anchors = make_anchors(side)
    sizes = torch.randint(200, 640, (num_images, 2))
    annotations: list[dict[str, object]] = []
    encodings, logits = [], []
    for image_id, size in enumerate(sizes, 1):
        N = int(torch.randint(2, 12, ()))
        wh = torch.exp(torch.empty(N, 2).uniform_(3.0, 5.0)).clamp(max=0.9 * side)
        corners = torch.rand(N, 2) * (side - wh)
        boxes, labels = torch.cat((corners, corners + wh), 1), torch.randint(num_classes, (N,))
        scale = (size.flip(-1) / side).repeat(2)
        for box, label in zip((boxes * scale).double().tolist(), labels.tolist(), strict=True):
            xywh = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            area = xywh[2] * xywh[3]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "category_id": label + 1, "bbox": xywh,
                                "area": area, "iscrowd": 0})  # fmt: skip
        overlap, nearest = paired_iou(anchors, boxes).max(1)
        logit = 1.2 * torch.randn(len(anchors), num_classes + 1)
        logit[:, 0] += 9
        logit[torch.arange(len(anchors)), labels[nearest] + 1] += 14 * overlap
        close = SSDBoxCoder().encode(boxes[nearest], anchors) + 0.7 * torch.randn(len(anchors), 4)
        encodings.append(torch.where(overlap[:, None] > 0.3, close, torch.randn(len(anchors), 4)))
        logits.append(logit)
    path = folder / "drawn.json"
    images = [
        {"id": i, "file_name": f"{i}.png", "height": height, "width": width}
        for i, (height, width) in enumerate(sizes.tolist(), 1)
    ]
    categories = [{"id": k + 1, "name": f"class {k}"} for k in range(num_classes)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return CocoIndex.read(path), RawPredictions(torch.stack(encodings), torch.stack(logits), anchors), sizes


def test_average_precision_of_drawn_predictions(tmp_path: Path) -> None:
    index, raw, sizes = draw(tmp_path, num_images=16, num_classes=80, side=320)
    ids = index.image_ids.tolist()

    def one_pass(config: PostprocessConfig) -> list[Detections]:
        return Postprocess(config, SSDBoxCoder(), "softmax", True)(raw, whole(sizes, 320), sizes)

    config = PostprocessConfig()
    scores = raw.class_logits.softmax(-1)[..., 1:]
    above = (scores > config.score_threshold).sum((1, 2))
    assert int(above.min()) > 2 * config.candidates  # the top-k does cut something off
    reference = average_precision(index, ids, exhaustive(raw, scores, sizes, config))
    assert 0.2 < reference < 0.9
    assert average_precision(index, ids, one_pass(config)) == pytest.approx(reference, abs=0.001)
    # What too few candidates would cost is seen here.
    assert average_precision(index, ids, one_pass(PostprocessConfig(candidates=50))) < reference - 0.005


def test_same_detections_where_nothing_is_cut_off(tmp_path: Path) -> None:
    _, raw, sizes = draw(tmp_path, num_images=3, num_classes=4, side=96)
    config = PostprocessConfig(candidates=10_000, max_detections=10_000)
    found = Postprocess(config, SSDBoxCoder(), "softmax", True)(raw, whole(sizes, 96), sizes)
    wanted = exhaustive(raw, raw.class_logits.softmax(-1)[..., 1:], sizes, config, limit=10_000)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(ours) == len(theirs) > 20
        assert ours.labels.tolist() == theirs.labels.tolist()
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.boxes, theirs.boxes, atol=1e-3, rtol=0)


@pytest.mark.parametrize("shift", [0.0, 1e4, 1e30])
def test_a_stray_box_changes_no_other(tmp_path: Path, shift: float) -> None:
    """One box of 19,000 pixels and more; its distance must not cost the others the digits that tell them apart."""
    _, raw, sizes = draw(tmp_path, num_images=2, num_classes=80, side=160)
    config = PostprocessConfig(score_threshold=0.002, candidates=100_000, max_detections=100_000)
    raw.codes[:, -1] = torch.tensor([shift, 0, 30, 30])  # as large as the coder makes it
    raw.class_logits[:, -1] = torch.tensor([0.0] + [8.0] + [-8.0] * 79)
    found = Postprocess(config, SSDBoxCoder(), "softmax", True)(raw, whole(sizes, 160), sizes)
    wanted = exhaustive(raw, raw.class_logits.softmax(-1)[..., 1:], sizes, config, limit=100_000)
    for ours, theirs in zip(found, wanted, strict=True):
        assert len(theirs) > 500
        assert len(ours) == len(theirs)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=1e-6, rtol=0)


@needs_shared("weights/ssdlite_mobilenet_v2_person_expected.npz")
def test_real_predictions() -> None:
    """What TensorFlow's SSDLite (one class, sigmoid scores) says of four images, and the detections it makes of that."""
    stored = np.load(SHARED / "weights/ssdlite_mobilenet_v2_person_expected.npz")
    encodings = torch.from_numpy(stored["raw_box_encodings"][:, :, 0][..., [1, 0, 3, 2]])  # (y, x, h, w) there
    raw = RawPredictions(encodings, torch.from_numpy(stored["raw_class_logits"]), make_anchors(300))
    sizes = torch.full((4, 2), 300)
    config = PostprocessConfig(nms_threshold=0.6, max_detections=100)
    found = Postprocess(config, SSDBoxCoder(), "sigmoid", True)(raw, whole(sizes, 300), sizes)
    wanted = exhaustive(raw, raw.class_logits[..., 1:].sigmoid(), sizes, config)
    tensorflow = zip(stored["detection_boxes"][..., [1, 0, 3, 2]] * 300, stored["detection_scores"], strict=True)
    for ours, reference, (boxes, scores) in zip(found, wanted, tensorflow, strict=True):
        assert len(ours) == len(reference) > 20
        torch.testing.assert_close(ours.scores, reference.scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(ours.boxes, reference.boxes, atol=1e-3, rtol=0)
        # TensorFlow suppresses before it clips, so that doubtful boxes at the border differ; the sure ones do not.
        sure = int((scores > 0.5).sum())
        assert sure > 0
        assert ours.scores[:sure].tolist() == pytest.approx(scores[:sure].tolist(), abs=1e-6)
        assert ours.boxes[:sure].numpy() == pytest.approx(boxes[:sure], abs=0.02)
