"""The data check with a detector: fit, suggestions, suspected label errors. Run: pytest tests/test_check_fit.py"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_predictor import small_detector

from detection.cli import check
from detection.data.coco import CocoIndex
from detection.data.drawn import DetectionSet, draw_detection_set
from detection.structures import Detections
from detection.weights.native import save_detector


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return draw_detection_set(tmp_path_factory.mktemp("drawn"), num_train=6, num_val=1, size=(96, 128))


def arguments(drawn: DetectionSet, *more: str) -> list[str]:
    return [str(drawn.train_annotations), "--images", str(drawn.train_images), "--workers", "0", *more]


@pytest.mark.parametrize(
    ("recipe", "told"),
    [("finetune:ssdlite", "nothing that was tried fits better"), ("finetune:litedet", "points reach the objects")],
)
def test_the_fit_is_printed_and_shown(
    recipe: str, told: str, drawn: DetectionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--recipe", recipe, "--suggest", "--report", str(tmp_path), "--fail-on", "never"]
    check.main(arguments(drawn, *more))
    printed = capsys.readouterr().out
    assert told in printed
    assert told in (tmp_path / "index.html").read_text()


def test_a_recipe_without_a_detector_is_refused(drawn: DetectionSet, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check.main(arguments(drawn, "--recipe", "finetune:classifier"))
    assert (
        "--recipe finetune:classifier gives a ClassificationConfig; a detector's is needed" in capsys.readouterr().err
    )


def test_suspected_label_errors_of_a_detector(
    drawn: DetectionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    index = CocoIndex.read(drawn.train_annotations)
    save_detector(tmp_path / "d.safetensors", *small_detector(index.class_names))
    seen = []

    def finds(self: object, images: list[np.ndarray]) -> list[Detections]:
        """One confident object a image, of a class of its own choice, in a corner where nothing is drawn."""
        seen.extend(image.shape for image in images)
        one = Detections(boxes=torch.tensor([[0.0, 0, 5, 5]]), scores=torch.tensor([0.99]), labels=torch.tensor([0]))
        return [one] * len(images)

    monkeypatch.setattr("detection.inference.predictor.Predictor.__call__", finds)
    more = ["--checkpoint", str(tmp_path / "d.safetensors"), "--device", "cpu", "--fail-on", "never"]
    check.main(arguments(drawn, *more, "--json", str(tmp_path / "f.json")))
    assert seen == [(96, 128, 3)] * 6
    kinds = {finding["kind"] for finding in json.loads((tmp_path / "f.json").read_text())["findings"]}
    assert any("label" in kind or "missing" in kind for kind in kinds), kinds
    save_detector(tmp_path / "d.safetensors", *small_detector(("moon", "sun")))
    with pytest.raises(SystemExit):
        check.main(arguments(drawn, *more))
    assert "the detector does not know the class" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        check.main([str(drawn.train_annotations), *more])
    assert "--images is missing: the folder of the images that the detector" in capsys.readouterr().err
