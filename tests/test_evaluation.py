"""COCO figures: hand-worked cases, both backends side by side, several processes. Run: pytest tests/test_evaluation.py"""

import contextlib
import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from detection.data.coco import CocoIndex
from detection.evaluation.coco_ap import FIGURES, Backend, CocoEvaluator, EvaluationResult
from detection.evaluation.run import evaluate
from detection.inference.runners import TorchRunner
from detection.structures import Batch, Detections, RawPredictions

CPU = torch.device("cpu")
BOTH: tuple[Backend, ...] = ("faster", "pycocotools")
Box = tuple[float, float, float, float]


def write_index(
    folder: Path,
    boxes: Sequence[tuple[int, int, Box] | tuple[int, int, Box, int]],
    num_images: int = 1,
    first_id: int = 1,
) -> CocoIndex:
    """A file with the classes cat (id 3) and dog (id 7), images 10, 11, ..., and boxes (image id, category id, xywh, crowd)."""
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in range(num_images)],
        "annotations": [
            {
                "id": number,
                "image_id": box[0],
                "category_id": box[1],
                "bbox": box[2],
                "area": box[2][2] * box[2][3],
                "iscrowd": box[3] if len(box) == 4 else 0,
            }
            for number, box in enumerate(boxes, first_id)
        ],
        "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return CocoIndex.read(path)


def found(*rows: tuple[Box, float, int]) -> Detections:
    """Detections from (xyxy, score, label)."""
    return Detections(
        boxes=torch.tensor([row[0] for row in rows]).reshape(-1, 4),
        scores=torch.tensor([row[1] for row in rows]),
        labels=torch.tensor([row[2] for row in rows], dtype=torch.int64),
    )


def measure(index: CocoIndex, backend: Backend, detections: dict[int, Detections]) -> EvaluationResult:
    evaluator = CocoEvaluator(index, backend)
    evaluator.update(list(detections), list(detections.values()))
    return evaluator.compute()


# ------------------------------------------------------------------------------------------------------ hand-worked AP


@pytest.mark.parametrize("backend", BOTH)
def test_nothing_found_is_zero(tmp_path: Path, backend: Backend) -> None:
    index = write_index(tmp_path, [(10, 3, (10, 10, 50, 50))])
    for result in (CocoEvaluator(index, backend).compute(), measure(index, backend, {10: found()})):
        assert result.figures["AP"] == result.figures["AR100"] == 0
        assert result.figures["AP_small"] == result.figures["AP_large"] == -1  # no such object: 50 x 50 is medium
        assert result.class_ap == {"cat": 0, "dog": None}
        assert result.class_counts == {"cat": 1, "dog": 0}
        assert (result.num_images, result.num_detections) == (1, 0)


@pytest.mark.parametrize("backend", BOTH)
def test_one_perfect_detection(tmp_path: Path, backend: Backend) -> None:
    result = measure(
        write_index(tmp_path, [(10, 7, (10, 10, 50, 40))]), backend, {10: found(((10, 10, 60, 50), 0.9, 1))}
    )
    wanted = dict.fromkeys(FIGURES, 1.0) | dict.fromkeys(("AP_small", "AP_large", "AR_small", "AR_large"), -1.0)
    assert result.figures == pytest.approx(wanted, abs=1e-9)
    assert result.class_ap == pytest.approx({"cat": None, "dog": 1})


@pytest.mark.parametrize("backend", BOTH)
def test_shifted_detection_counts_at_three_of_ten_thresholds(tmp_path: Path, backend: Backend) -> None:
    # 100 x 100 shifted by 24: IoU = 76 / 124 = 0.613, enough at 0.50, 0.55 and 0.60.
    result = measure(
        write_index(tmp_path, [(10, 3, (0, 0, 100, 100))]), backend, {10: found(((24, 0, 124, 100), 0.9, 0))}
    )
    assert result.figures["AP"] == pytest.approx(0.3, abs=1e-9)
    assert result.figures["AP50"] == pytest.approx(1, abs=1e-9)
    assert result.figures["AP75"] == 0
    assert result.figures["AP_large"] == pytest.approx(0.3, abs=1e-9)  # 10,000 > 96 x 96


@pytest.mark.parametrize("backend", BOTH)
def test_false_positives_between_true_ones(tmp_path: Path, backend: Backend) -> None:
    # Right, wrong, right: precision 1 up to recall 0.5 (51 of 101 levels), 2/3 up to recall 1 (50 levels).
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50)), (10, 3, (200, 200, 50, 50))])
    right, wrong, last = (0, 0, 50, 50), (400, 400, 440, 440), (200, 200, 250, 250)
    result = measure(index, backend, {10: found((right, 0.9, 0), (wrong, 0.8, 0), (last, 0.7, 0))})
    assert result.figures["AP"] == pytest.approx((51 + 50 * 2 / 3) / 101, abs=1e-9)
    assert result.figures["AR1"] == pytest.approx(0.5, abs=1e-9)
    # Of another class the wrong one does no harm: that class has no object and no part in the mean.
    result = measure(index, backend, {10: found((right, 0.9, 0), (wrong, 0.8, 1), (last, 0.7, 0))})
    assert result.figures["AP"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("backend", BOTH)
def test_detections_in_a_crowd_are_neither_right_nor_wrong(tmp_path: Path, backend: Backend) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50)), (10, 3, (200, 200, 200, 200), 1)])
    in_crowd = [((200, 200, 240, 240), 0.95, 0), ((300, 300, 340, 340), 0.9, 0)]
    result = measure(index, backend, {10: found(*in_crowd, ((0, 0, 50, 50), 0.8, 0))})
    assert result.figures["AP"] == pytest.approx(1, abs=1e-9)
    assert result.class_counts["cat"] == 1
    outside = [((500, 0, 540, 40), 0.95, 0), ((560, 0, 600, 40), 0.9, 0)]
    result = measure(index, backend, {10: found(*outside, ((0, 0, 50, 50), 0.8, 0))})
    assert result.figures["AP"] == pytest.approx(1 / 3, abs=1e-9)


@pytest.mark.parametrize("backend", BOTH)
def test_a_image_without_detections_costs_recall(tmp_path: Path, backend: Backend) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50)), (11, 3, (0, 0, 50, 50))], num_images=3)
    result = measure(index, backend, {10: found(((0, 0, 50, 50), 0.9, 0))})
    assert result.figures["AP"] == pytest.approx(51 / 101, abs=1e-9)
    assert result.num_images == 3


@pytest.mark.parametrize("backend", BOTH)
def test_annotation_with_id_zero_counts(tmp_path: Path, backend: Backend) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50))], first_id=0)
    assert measure(index, backend, {10: found(((0, 0, 50, 50), 0.9, 0))}).figures["AP"] == pytest.approx(1, abs=1e-9)


# -------------------------------------------------------------------------------------------------- against pycocotools


def draw(folder: Path, seed: int = 0) -> tuple[CocoIndex, dict[int, Detections]]:
    """Crowds, empty images, tiny and large boxes, equal scores, more than 100 detections of a class in an image."""
    rng = np.random.default_rng(seed)
    num_images, num_classes = 40, 5
    image_ids = rng.permutation(1000)[:num_images].tolist()
    annotations: list[dict[str, Any]] = []
    detections = {}
    for position, image_id in enumerate(image_ids):
        # Every fourth image is empty, and the last class has no object at all.
        N = 0 if position % 4 == 3 else int(rng.integers(1, 15))
        sides = np.exp(rng.uniform(np.log(3), np.log(400), (N, 2)))
        corners = rng.random((N, 2)) * (640, 480) * 0.5
        labels = rng.integers(0, num_classes - 1, N)
        for corner, side, label in zip(corners, sides, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": 10 * (int(label) + 1),
                    "bbox": [*corner.round(2).tolist(), *side.round(2).tolist()],
                    "area": float(side.prod() * rng.uniform(0.4, 1)),  # a mask's, not the box's
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
        near = np.repeat(np.arange(N), 3)
        noise = rng.normal(0, 0.12, (len(near), 4))
        num_far = 300 if position < 3 else 10
        far = rng.random((num_far, 2)) * 300
        first = np.concatenate([corners[near] + noise[:, :2] * sides[near], far])
        sides_found = np.concatenate([sides[near] * np.exp(noise[:, 2:]), rng.random((num_far, 2)) * 150])
        far_labels = rng.integers(0, 1 if position < 3 else num_classes, num_far)
        detections[image_id] = Detections(
            boxes=torch.from_numpy(np.concatenate([first, first + sides_found], 1)).float(),
            scores=torch.from_numpy(rng.integers(1, 20, len(first)) / 20).float(),
            labels=torch.from_numpy(np.concatenate([labels[near], far_labels])),
        )
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 640, "height": 480} for i in image_ids],
        "annotations": [annotations[i] for i in rng.permutation(len(annotations))],
        "categories": [{"id": 10 * (k + 1), "name": f"class {k}"} for k in range(num_classes)],
    }
    path = folder / "drawn.json"
    path.write_text(json.dumps(content))
    return CocoIndex.read(path), detections


@pytest.mark.parametrize("seed", [0, 1])
def test_both_backends_equal_pycocotools_on_the_file(tmp_path: Path, seed: int) -> None:
    index, detections = draw(tmp_path, seed)
    results = [measure(index, backend, detections) for backend in BOTH]
    evaluator = CocoEvaluator(index)
    evaluator.update(list(detections), list(detections.values()))
    evaluator.write_coco_results(tmp_path / "results.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(index.path))
        reference = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    wanted = dict(zip(FIGURES, reference.stats.tolist(), strict=True))
    assert 0.1 < wanted["AP"] < 0.9
    assert all(0 < value < 1 for value in wanted.values())
    precision = reference.eval["precision"][:, :, :, 0, 2]
    for result in results:
        assert result.figures == pytest.approx(wanted, abs=1e-9, rel=0)
        for k in range(4):
            assert result.class_ap[f"class {k}"] == pytest.approx(precision[:, :, k].mean(), abs=1e-9, rel=0)
        assert result.class_ap["class 4"] is None


def test_order_of_batches_does_not_matter(tmp_path: Path) -> None:
    index, detections = draw(tmp_path)
    backwards = dict(reversed(detections.items()))
    assert measure(index, "faster", detections).figures == measure(index, "faster", backwards).figures


def test_nothing_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)  # as in a training
    index, detections = draw(tmp_path)
    for backend in BOTH:
        measure(index, backend, detections)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


# ------------------------------------------------------------------------------------------- classes, results, mistakes


def test_some_classes_alone(tmp_path: Path) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50)), (10, 7, (100, 100, 50, 50))])
    evaluator = CocoEvaluator(index, classes=["dog"])
    evaluator.update([10], [found(((100, 100, 150, 150), 0.9, 1), ((0, 0, 50, 50), 0.8, 0))])
    result = evaluator.compute()
    assert result.class_ap == pytest.approx({"dog": 1})
    assert result.class_counts == {"dog": 1}
    assert result.num_detections == 1


def test_select_of_classes_keeps_images_and_lets_other_categories_go(tmp_path: Path) -> None:
    boxes: list[tuple[int, int, Box]] = [(10, 3, (0, 0, 5, 5)), (11, 7, (1, 1, 5, 5)), (12, 3, (2, 2, 5, 5))]
    index = write_index(tmp_path, boxes, num_images=3).select(class_names=["cat"])
    assert index.offsets.tolist() == [0, 1, 1, 2]
    assert index.xywh[:, 0].tolist() == [0, 2]
    assert len(index) == 3
    # A detector that knows cats alone can now be measured on this file of cats and dogs.
    assert CocoEvaluator(index.with_categories(np.array([1]), ("cat",))).class_counts == {"cat": 2}
    with pytest.raises(ValueError, match=r"has no class 'cow'; it has 'cat', 'dog'"):
        index.select(class_names=["cow"])


def test_coco_results(tmp_path: Path) -> None:
    evaluator = CocoEvaluator(write_index(tmp_path, [(10, 3, (0, 0, 50, 50))], num_images=2))
    evaluator.update([11, 10], [found(((1, 2, 11, 22), 0.5, 1)), found(((0, 0, 4, 8), 0.25, 0))])
    assert evaluator.write_coco_results(tmp_path / "new" / "results.json") == 2
    assert json.loads((tmp_path / "new" / "results.json").read_text()) == [
        {"image_id": 10, "category_id": 3, "bbox": [0, 0, 4, 8], "score": 0.25},
        {"image_id": 11, "category_id": 7, "bbox": [1, 2, 10, 20], "score": 0.5},
    ]
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["results.json"]


@pytest.mark.parametrize("boxes", [[], [(10, 3, (0, 0, 50, 50), 1)]])
def test_no_ground_truth(tmp_path: Path, boxes: list[Any]) -> None:
    with pytest.raises(ValueError, match=rf"annotations.json: no ground truth.*1 images, {len(boxes)} annotations"):
        CocoEvaluator(write_index(tmp_path, boxes))


def test_mistakes(tmp_path: Path) -> None:
    index = write_index(tmp_path, [(10, 3, (0, 0, 50, 50))])
    with pytest.raises(ValueError, match=r"no such class: 'cow'; the classes are 'cat', 'dog'"):
        CocoEvaluator(index, classes=["cat", "cow"])
    with pytest.raises(ValueError, match=r"no ground truth to evaluate on.*not one box of 'dog' that is not a crowd"):
        CocoEvaluator(index, classes=["dog"])
    evaluator = CocoEvaluator(index)
    with pytest.raises(ValueError, match=r"image id 99 is not in .*annotations.json"):
        evaluator.update([99], [found()])
    with pytest.raises(ValueError, match="2 image ids came with the detections of 1 images"):
        evaluator.update([10, 10], [found()])


# ------------------------------------------------------------------------------------------------------------- the loop


class Corners(nn.Module):
    """A network that says nothing but the mean of its input."""

    def forward(self, images: Tensor) -> RawPredictions:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        means = images.float().mean((1, 2, 3))[:, None, None]
        return RawPredictions(means.expand(-1, 1, 4), means, torch.zeros(1, 4))


def batch_of(image_ids: list[int], skipped: list[str]) -> Batch:
    B = len(image_ids)
    return Batch(
        images=torch.tensor(image_ids, dtype=torch.uint8).view(B, 1, 1, 1).expand(B, 3, 8, 8),
        boxes=torch.zeros(B, 1, 4),
        labels=torch.zeros(B, 1, dtype=torch.int64),
        valid=torch.zeros(B, 1, dtype=torch.bool),
        image_ids=torch.tensor(image_ids, dtype=torch.int64),
        original_sizes=torch.full((B, 2), 100),
        placements=torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(B, 4),
        skipped=skipped,
    )


def test_loop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def postprocess(raw: RawPredictions, placements: Tensor, original_sizes: Tensor) -> list[Detections]:
        assert original_sizes.tolist() == [[100, 100]] * len(placements)
        corners = raw.class_logits[:, 0, 0].tolist()  # the image's id, because the image is filled with it
        return [found(((corner, corner, corner + 50, corner + 50), 0.9, 0)) for corner in corners]

    index = write_index(tmp_path, [(10 + i, 3, (10 + i, 10 + i, 50, 50)) for i in range(4)], num_images=4)
    batches = [batch_of([10, 11], []), batch_of([], ["a.png: gone"]), batch_of([13], ["b.png: rotten"])]
    model, evaluator = Corners(), CocoEvaluator(index)
    timing = evaluate(TorchRunner(model, CPU), batches, postprocess, evaluator, timing=True)
    assert model.training
    assert min(timing.network, timing.postprocess, timing.wait) > 0
    result = evaluator.compute()
    assert result.unreadable == ("a.png: gone", "b.png: rotten")
    assert result.figures["AR100"] == pytest.approx(0.75, abs=1e-9)  # image 12 was not read
    assert "nothing was found: b.png: rotten" in caplog.text

    model.eval()
    evaluate(TorchRunner(model, CPU, "bf16"), batches, postprocess, evaluator)
    assert [model.training] == [False]
    assert evaluator.compute() == result  # an image that comes again is not counted again

    many = [batch_of([10], [f"{n}.png: gone" for n in range(12)])]
    assert evaluate(TorchRunner(model, CPU), many, postprocess, evaluator) is None
    assert "... and 2 more" in caplog.text


def test_only_what_the_network_needs_goes_to_the_device(tmp_path: Path) -> None:
    """A device from which nothing can be read back stands for one that is slow to be read."""

    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, images: Tensor) -> RawPredictions:
            assert images.device == self.device
            return RawPredictions(torch.zeros(1, 1, 4), torch.zeros(1, 1, 1), torch.zeros(1, 4))

    def postprocess(raw: RawPredictions, placements: Tensor, original_sizes: Tensor) -> list[Detections]:
        assert placements.device == original_sizes.device == CPU
        return [found(((0, 0, 50, 50), 0.9, 0))]

    evaluator = CocoEvaluator(write_index(tmp_path, [(10, 3, (0, 0, 50, 50))]))
    evaluate(Elsewhere(), [batch_of([10], [])], postprocess, evaluator)
    assert evaluator.compute().figures["AP"] == pytest.approx(1, abs=1e-9)


def test_the_device_is_waited_for_only_where_timing_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    monkeypatch.setattr("detection.evaluation.run._Clock.ends", lambda clock, stage: waits.append(stage))
    evaluator = CocoEvaluator(write_index(tmp_path, [(10, 3, (0, 0, 50, 50))]))
    runner = TorchRunner(Corners(), CPU)
    evaluate(runner, [batch_of([10], [])], lambda *_: [found()], evaluator)
    assert waits == []
    evaluate(runner, [batch_of([10], [])], lambda *_: [found()], evaluator, timing=True)
    assert waits == ["wait", "network", "postprocess"]


# ------------------------------------------------------------------------------------------------------ several processes


def _evaluate_share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    index, detections = draw(folder / str(rank))
    evaluator = CocoEvaluator(index)
    # The first image goes to both, as with a sampler that pads; the second process has other detections for it.
    ids = list(detections)[rank::2] + list(detections)[:1]
    for image_id in dict.fromkeys(ids):
        own = detections[image_id]
        is_padding = rank == 1 and image_id == ids[-1]
        evaluator.update([image_id], [Detections(boxes=own.boxes + 99, scores=own.scores, labels=own.labels)]
                         if is_padding else [own])  # fmt: skip
    evaluator.note_unreadable(["shared.png: gone", f"{rank}.png: gone"])
    evaluator.merge_across_processes()
    if rank == 0:
        result = evaluator.compute()
        content = {"figures": result.figures, "n": result.num_detections, "unreadable": result.unreadable}
        (folder / "merged.json").write_text(json.dumps(content))
    dist.destroy_process_group()


def test_two_processes_count_every_image_once(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_evaluate_share, (tmp_path,), nprocs=2)
    index, detections = draw(tmp_path)
    wanted = measure(index, "faster", detections)
    merged = json.loads((tmp_path / "merged.json").read_text())
    assert merged["figures"] == wanted.figures
    assert merged["n"] == wanted.num_detections
    assert merged["unreadable"] == ["shared.png: gone", "0.png: gone", "1.png: gone"]


def _evaluate_shares(rank: int, folder: Path, shares: dict[str, list[list[int]]]) -> None:
    torch.set_num_threads(1)
    index, detections = draw(folder / str(rank))
    for name, own in shares.items():
        if rank >= len(own):
            continue
        address = f"file://{folder / name}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=len(own))
        evaluator = CocoEvaluator(index)
        evaluator.update(own[rank], [detections[image_id] for image_id in own[rank]])
        evaluator.merge_across_processes()
        if rank == 0:
            (folder / f"{name}.json").write_text(json.dumps(evaluator.compute().figures))
        dist.destroy_process_group()


@pytest.mark.slow
def test_ap_on_one_two_and_three_processes(tmp_path: Path) -> None:
    index, detections = draw(tmp_path)
    ids = [int(image_id) for image_id in index.image_ids]
    with_objects = [image_id for position, image_id in enumerate(detections) if position % 4 != 3]
    without = [image_id for image_id in ids if image_id not in with_objects]
    assert (len(ids), len(without)) == (40, 10)
    shares = {
        "one": [ids],
        "two": [ids[0::2], ids[1::2]],
        "three_odd": [ids[0::3], ids[1::3], ids[2::3]],  # 14, 13 and 13 images
        "rank_without_objects": [without, with_objects],
        "ranks_without_images": [[], ids, []],
    }
    for rank in range(3):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_evaluate_shares, (tmp_path, shares), nprocs=3)
    wanted = measure(index, "faster", detections).figures
    assert wanted["AP"] > 0.1
    for name in shares:
        merged = json.loads((tmp_path / f"{name}.json").read_text())
        assert merged == pytest.approx(wanted, abs=1e-9, nan_ok=True), name


def test_merge_without_a_process_group_changes_nothing(tmp_path: Path) -> None:
    index, detections = draw(tmp_path)
    evaluator = CocoEvaluator(index)
    evaluator.update(list(detections), list(detections.values()))
    evaluator.merge_across_processes()
    assert evaluator.compute() == measure(index, "faster", detections)
