"""The thresholds of a class, once in a detector's file, hold wherever no score is given: in a video, and in what is exported.

That ``litedet eval --write-thresholds`` writes them, test_eval_det.py says.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_predictor import small_detector

from detection import load_detector
from detection.cli.video import main as video
from detection.export.run import ExportJob, export
from detection.structures import Detections
from detection.weights.native import save_detector


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, tuple[float, ...]]:
    """A detector's file, a folder of images, and the thresholds: half of what is found of a class is below."""
    folder = tmp_path_factory.mktemp("tuned")
    model, info = small_detector()
    save_detector(folder / "plain.safetensors", model, info)
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), cv2.resize(coarse, (128, 96)))
    found = load_detector(folder / "plain.safetensors", device="cpu", score_threshold=0.001)(paths(folder))
    info.thresholds = tuple(
        float(np.median([float(score) for one in found for score in one.scores[one.labels == label]] or [0.5]))
        for label in range(len(info.class_names))
    )
    save_detector(folder / "tuned.safetensors", model, info)
    assert 0 < sum(map(len, kept(found, info.thresholds))) < sum(map(len, found))
    return folder / "tuned.safetensors", folder / "images", info.thresholds


def paths(folder: Path) -> list[str]:
    return [str(path) for path in sorted((folder / "images").iterdir())]


def kept(found: list[Detections], thresholds: tuple[float, ...]) -> list[list[tuple[int, float]]]:
    """(label, score) of what is at or above the threshold of its class, for each image."""
    pairs = [list(zip(one.labels.tolist(), one.scores.tolist(), strict=True)) for one in found]
    return [[(label, score) for label, score in one if score >= thresholds[label]] for one in pairs]


def test_a_video_shows_each_class_from_its_threshold_on(
    tuned: tuple[Path, Path, tuple[float, ...]], tmp_path: Path
) -> None:
    file, images, thresholds = tuned
    lines = tmp_path / "out.jsonl"
    video([str(file), "--source", str(images), "--json", str(lines), "--device", "cpu"])
    shown = [json.loads(line)["detections"] for line in lines.read_text().splitlines()]
    everything = load_detector(file, device="cpu", score_threshold=0.001)(paths(images.parent))
    expected = [
        [(label, pytest.approx(score, abs=1e-4)) for label, score in one] for one in kept(everything, thresholds)
    ]
    assert [[(one["label"], one["score"]) for one in frame] for frame in shown] == expected


@pytest.mark.slow
def test_an_exported_file_has_them_too(tuned: tuple[Path, Path, tuple[float, ...]], tmp_path: Path) -> None:
    file, images, thresholds = tuned
    job = ExportJob(checkpoint=file, to="torch", out=tmp_path / "tuned.pt2", images=images, raw=True)
    assert export(job, say=lambda line: None).record.info.thresholds == thresholds
    everything = load_detector(tmp_path / "tuned.pt2", score_threshold=0.001)(paths(images.parent))
    shown = load_detector(tmp_path / "tuned.pt2")(paths(images.parent))
    assert kept(shown, (0.0,) * len(thresholds)) == kept(everything, thresholds)
    assert sum(map(len, shown)) > 0
