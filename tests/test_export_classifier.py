"""Exported classifiers say what torch says, and their accuracy is measured. Run: pytest tests/test_export_classifier.py"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import small
import torch
from test_export import needs

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.weights.info import WeightsInfo
from backbones.weights.native import read_model, save_weights
from detection import load_detector
from detection.classification.config import TransformConfig
from detection.classification.data import EvalTransform
from detection.classification.exported import ClassifierRecord, open_classifier
from detection.export.classifier import LogitDifference, Logits
from detection.export.run import ExportJob, ExportResult, export
from detection.export.verification import BOUNDS
from detection.inference.exported import Format

NAMES = ("cat", "dog", "owl")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier that tells colours apart by chance, and a folder for two of its three classes."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(backbone=small.BACKBONE), len(NAMES))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of the images below: answers of a size that can be compared
    with torch.no_grad():
        model(torch.randn(16, 3, 64, 64))
        model.linear.weight *= 100
    info = WeightsInfo(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25), class_names=NAMES)
    save_weights(folder / "c.safetensors", model.eval(), info)
    generator = np.random.default_rng(0)
    for name in ("dog", "owl"):
        (folder / "labelled" / name).mkdir(parents=True)
        for number in range(3):
            coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
            cv2.imwrite(str(folder / "labelled" / name / f"{number}.png"), cv2.resize(coarse, (90, 70)))
    return folder


def job_of(scene: Path, to: Format, name: str, **more: object) -> ExportJob:
    given = {"images": scene / "labelled", "labelled": scene / "labelled", "input_size": (64, 64), **more}
    return ExportJob(checkpoint=scene / "c.safetensors", to=to, out=scene / name, **given)  # type: ignore[arg-type]


def check_classifier(scene: Path, result: ExportResult) -> None:
    classifier = open_classifier(result.path)
    assert isinstance(result.record, ClassifierRecord)
    assert classifier.record == result.record
    assert classifier.record.class_names == NAMES
    model, info = read_model(scene / "c.safetensors")
    transform = EvalTransform(TransformConfig(eval_size=64))
    files = sorted((scene / "labelled").rglob("*.png"))
    images = [cv2.cvtColor(cv2.imread(str(file)), cv2.COLOR_BGR2RGB) for file in files]
    pixels = torch.from_numpy(np.stack([transform(image, 0, 0) for image in images])).permute(0, 3, 1, 2)
    with torch.no_grad():
        (expected,) = Logits(model, info)(pixels)  # type: ignore[arg-type]
    assert len(set(expected.argmax(1).tolist())) > 1
    torch.testing.assert_close(classifier(images), expected, rtol=0, atol=1e-3)
    torch.testing.assert_close(classifier(files[0]), expected[:1], rtol=0, atol=1e-3)
    top1 = (expected.argmax(1) == torch.tensor([1, 1, 1, 2, 2, 2])).double().mean().item()  # dog, owl
    assert result.record.measured.top1_torch == pytest.approx(top1)
    assert result.chosen.figure == pytest.approx(top1)
    assert result.drop == pytest.approx(0)


def test_torch_and_what_is_refused(scene: Path) -> None:
    check_classifier(scene, export(job_of(scene, "torch", "c.pt2"), say=lambda line: None))
    with pytest.raises(UserError, match=r"^\S+ is an exported classifier; a detector was expected$"):
        load_detector(scene / "c.pt2")
    with pytest.raises(UserError, match="measured with --labelled"):
        export(job_of(scene, "torch", "d.pt2", annotations=scene / "x.json"), say=lambda line: None)
    with pytest.raises(UserError, match="is a square"):
        export(job_of(scene, "torch", "d.pt2", input_size=(64, 96)), say=lambda line: None)
    (scene / "other" / "eel").mkdir(parents=True)
    cv2.imwrite(str(scene / "other" / "eel" / "0.png"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="the classifier has no class 'eel'; it has cat, dog, owl"):
        export(job_of(scene, "torch", "d.pt2", labelled=scene / "other"), say=lambda line: None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "name"),
    [("onnx", "c.onnx"), ("openvino", "c.xml"), ("executorch", "c.pte"), ("ncnn", "n.param")],
)
def test_other_formats(scene: Path, to: Format, name: str) -> None:
    needs(to)
    check_classifier(scene, export(job_of(scene, to, name), say=lambda line: None))


def test_what_does_not_match_is_told() -> None:
    same = LogitDifference(num_images=10, logits=0.0, same=10)
    assert same.complete
    assert same.broken(BOUNDS["float32"]) is None
    assert "logits differ by 1" in str(LogitDifference(num_images=10, logits=1.0, same=10).broken(BOUNDS["float32"]))
    assert "7 of 10 images" in str(LogitDifference(num_images=10, logits=1.0, same=7).broken(BOUNDS["int8"]))
    assert (
        LogitDifference(num_images=10, logits=9.0, same=9).error
        > LogitDifference(num_images=10, logits=20.0, same=10).error
    )
