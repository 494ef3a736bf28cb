import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from shared_data import SHARED, needs_shared

import configs.imagenet
from backbones.classifier import Classifier, ClassifierConfig
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.info import WeightsInfo
from backbones.weights.native import load_backbone, load_classifier, save_weights
from backbones.weights.readers import read_metadata
from detection.classification.config import ClassificationConfig
from detection.classification.task import ClassificationTask
from detection.cli.train import main as train_det
from detection.cli.train_cls import main
from detection.data.drawn import draw_classification_set
from detection.engine.checkpoint import load_checkpoint
from detection.engine.runtime import Runtime

ROOT = Path(__file__).resolve().parents[1]
RECIPE = f"{ROOT}/configs/finetune.py:classifier"
SMALL = [
    *small.BACKBONE_FLAGS, "--transform.size", "32", "--transform.eval-size", "32", "--data.workers", "0",
    "--train.epochs", "2", "--train.batch-size", "8", "--train.device", "cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return draw_classification_set(tmp_path_factory.mktemp("drawn"), num_train=4, num_val=2, size=(48, 48))


def arguments(folders: tuple[Path, Path], run_dir: Path, *more: str) -> list[str]:
    train, val = folders
    return [RECIPE, "--data.train", str(train), "--data.val", str(val), "--run-dir", str(run_dir), *SMALL, *more]


@pytest.mark.slow
def test_whole_road(folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    started_from = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35)), 11)
    info = WeightsInfo(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), source="a test", licence="CC0-1.0")
    save_weights(tmp_path / "start.safetensors", started_from, info)
    run_dir = tmp_path / "run"
    main(arguments(folders, run_dir, "--weights", str(tmp_path / "start.safetensors")))
    printed = capsys.readouterr().out
    assert re.search(r"best epoch \d: top-1 0\.\d+, top-5 \d\.\d+: .*backbone.safetensors", printed)
    assert "last epoch 2: top-1" in printed

    summary = json.loads((run_dir / "summary.json").read_text())
    assert 0 <= summary["best"]["top1"] <= summary["best"]["top5"] <= 1
    assert summary["best"]["top1"] >= summary["last"]["top1"]
    assert summary["weights"] == str(run_dir / "backbone.safetensors")
    metadata = read_metadata(run_dir / "backbone.safetensors")
    class_names = tuple(sorted(folder.name for folder in folders[0].iterdir()))
    assert json.loads(metadata["class_names"]) == list(class_names)
    assert metadata["source"] == f"trained on {4 * len(class_names)} images of {len(class_names)} classes, from a test"
    assert metadata["licence"] == "CC0-1.0"

    # What a detector and the next classifier take: the best epoch's weights with their normalisation.
    config = MobileNetV2Config(width=0.35, frozen_stages=0)
    backbone = MobileNetV2(config, ("stride16_expansion", "last"))
    assert load_backbone(backbone, run_dir / "backbone.safetensors").mean == (0.5, 0.5, 0.5)
    classifier = Classifier(ClassifierConfig(backbone=config), len(class_names))
    _, remark = load_classifier(classifier, run_dir / "backbone.safetensors", class_names)
    assert remark == ""
    best = load_checkpoint(run_dir / "best.pt")
    assert best["extra"]["classifier"]["class_names"] == list(class_names)
    for name, tensor in classifier.state_dict().items():
        assert torch.equal(tensor, best["weights"][name]), name
    assert torch.equal(backbone.last.conv.weight, classifier.backbone.last.conv.weight)
    assert not torch.equal(classifier.backbone.last.conv.weight, started_from.backbone.last.conv.weight), (
        "it has learnt"
    )


def run_and_fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_a_run_goes_on_from_its_folder_alone(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = tmp_path / "start.safetensors"
    info = WeightsInfo(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), source="a test", licence="CC0-1.0")
    save_weights(weights, Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35)), 11), info)
    more = ("--weights", str(weights), "--model.backbone.width", "1.0", "--model.backbone.frozen-stages", "2")
    main(arguments(folders, tmp_path / "straight", *more))

    evaluate = ClassificationTask.evaluate
    calls = []

    def stop_at_the_second(task: ClassificationTask, model: torch.nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(task, model)

    monkeypatch.setattr(ClassificationTask, "evaluate", stop_at_the_second)
    with pytest.raises(SystemExit):
        main(arguments(folders, tmp_path / "run", *more))
    monkeypatch.undo()
    weights.unlink()
    moved = folders[0].rename(folders[0].with_name("moved"))
    try:
        main([str(tmp_path / "run"), "--data.train", str(moved)])
    finally:
        moved.rename(folders[0])
    ours, theirs = (load_checkpoint(tmp_path / name / "last.pt") for name in ("run", "straight"))
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    metadata = [read_metadata(tmp_path / name / "backbone.safetensors") for name in ("run", "straight")]
    assert metadata[0] == metadata[1]

    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_det([str(tmp_path / "run")])
    assert "a checkpoint of another kind of training?" in capsys.readouterr().err


def test_other_class_count_is_said(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_weights(
        tmp_path / "a.safetensors",
        Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35)), 11),
        WeightsInfo(),
    )
    config = ClassificationConfig(weights=str(tmp_path / "a.safetensors"))
    config.model.backbone.width = 0.35
    config.data.train, config.data.val, config.data.workers = *folders, 0
    with caplog.at_level("INFO"):
        task = ClassificationTask(config, Runtime(device=torch.device("cpu")))
    num_classes = len(task.class_names)
    assert f"a.safetensors has 11 classes: the linear layer for {num_classes} classes is new" in caplog.text


def equal(a: Any, b: Any) -> bool:
    """Two nested checkpoints are the same to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.mark.slow
def test_same_seed_same_weights(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With and without data workers, and stopped and resumed: not one bit differs. Dropout is on, and draws."""

    def state(name: str, *more: str) -> dict[str, Any]:
        torch.manual_seed(len(name))  # whatever the process did before
        main(arguments(folders, tmp_path / name, "--train.num-threads", "1", *more))
        last = load_checkpoint(tmp_path / name / "last.pt")
        training = {key: last["training"][key] for key in ("model", "ema", "optimizer", "schedule", "scaler")}
        losses = [record["losses"] for record in last["training"]["history"]]
        return training | {"weights": last["weights"], "metrics": last["metrics"], "losses": losses}

    workers = ["--model.dropout", "0.5", "--data.workers", "2"]
    once = state("once", *workers)
    assert equal(state("no workers", "--model.dropout", "0.5", "--data.workers", "0"), once)

    evaluate, calls = ClassificationTask.evaluate, []

    def evaluate_once(task: ClassificationTask, model: torch.nn.Module) -> dict[str, float]:
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(task, model)

    with monkeypatch.context() as patch:
        patch.setattr(ClassificationTask, "evaluate", evaluate_once)
        with pytest.raises(SystemExit):
            state("stopped", *workers)
    assert load_checkpoint(tmp_path / "stopped" / "last.pt")["epoch"] == 1
    assert equal(state("stopped", *workers, "--train.resume", "True"), once)


def test_the_config_that_was_given_stays_as_it_is(folders: tuple[Path, Path], tmp_path: Path) -> None:
    narrow = ClassifierConfig(backbone=MobileNetV2Config(width=0.35, padding="tf_same"))
    save_weights(tmp_path / "a.safetensors", Classifier(narrow, 11), WeightsInfo())
    config = ClassificationConfig(weights=str(tmp_path / "a.safetensors"))
    config.data.train, config.data.val, config.data.workers = *folders, 0
    before = copy.deepcopy(config)
    task = ClassificationTask(config, Runtime(device=torch.device("cpu")))
    assert config == before
    assert task.config.model.backbone.width == 0.35
    assert task.checkpoint_extra()["classifier"]["model"]["backbone"]["padding"] == "tf_same"
    assert task.config == replace(before, model=replace(before.model, backbone=narrow.backbone))

    run_dir = tmp_path / "run"
    main(arguments(folders, run_dir, "--weights", config.weights or "", "--train.epochs", "1"))
    assert json.loads((run_dir / "config.json").read_text())["model"]["backbone"]["padding"] == "tf_same", "recorded"


def test_mistakes_end_in_one_clear_line(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, val = folders
    run = tmp_path / "run"
    assert "error: no --data.train given" in run_and_fail([RECIPE, *SMALL], capsys)
    assert "error: no --data.val given" in run_and_fail([RECIPE, "--data.train", str(train), *SMALL], capsys)
    assert "gone does not exist" in run_and_fail(arguments((tmp_path / "gone", val), run), capsys)
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in run_and_fail(arguments((train, tmp_path / "empty"), run), capsys)
    assert "no.pt does not exist" in run_and_fail(arguments(folders, run, "--weights", "no.pt"), capsys)
    (tmp_path / "text.pt").write_text("no weights")
    text = str(tmp_path / "text.pt")
    assert "text.pt is not a weights file" in run_and_fail(arguments(folders, run, "--weights", text), capsys)
    assert "label_smoothing is 1.5" in run_and_fail(arguments(folders, run, "--label-smoothing", "1.5"), capsys)
    assert "backbone_lr_scale must be positive" in run_and_fail(
        arguments(folders, run, "--backbone-lr-scale", "0"), capsys
    )
    assert "data.workers must be" in run_and_fail(arguments(folders, run, "--data.workers", "-1"), capsys)
    unfed = run_and_fail([RECIPE, *SMALL, "--model.backbone.frozen-stages", "3"], capsys)
    assert "frozen_stages is 3 and there are no weights to start from" in unfed
    detector = f"{ROOT}/configs/finetune.py:ssdlite"
    message = run_and_fail([detector], capsys)
    assert "gives a DetectionConfig" in message
    assert "needs a ClassificationConfig" in message
    assert not run.exists()


def test_too_many_rotten_validation_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    folders = draw_classification_set(tmp_path, num_train=4, num_val=1, size=(48, 48))
    next(folders[1].glob("*/*.jpg")).write_bytes(b"rotten")
    message = run_and_fail(arguments(folders, tmp_path / "run", "--train.epochs", "1"), capsys)
    assert re.search(r"1 of \d+ validation images cannot be read, more than --train.max-skipped-share 0.01", message)
    main(arguments(folders, tmp_path / "run2", "--train.epochs", "1", "--train.max-skipped-share", "0.5"))
    assert "left out of the accuracy, it cannot be read" in caplog.text


def test_one_rotten_training_image_does_not_end_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = draw_classification_set(tmp_path, num_train=4, num_val=1, size=(48, 48))
    rotten = next(folders[0].glob("*/*.jpg"))
    rotten.write_bytes(b"rotten")
    main(arguments(folders, tmp_path / "run", "--train.epochs", "1", "--train.max-skipped-share", "0.1"))
    assert f"skipped an image that cannot be read: {rotten}" in caplog.text
    assert "1 unreadable training images were skipped" in caplog.text
    message = run_and_fail(
        arguments(folders, tmp_path / "run2", "--train.epochs", "1", "--train.max-skipped-share", "0"), capsys
    )
    assert "training images cannot be read, more than --train.max-skipped-share 0 allows" in message


@pytest.mark.parametrize("name", ["mobilenetv2", "mobilenetv2_075", "mobilenetv2_050", "mobilenetv2_035"])
def test_imagenet_recipes(name: str) -> None:
    recipe = getattr(configs.imagenet, name)
    config = recipe()
    config.validate()
    assert "Not trained here" in recipe.__doc__
    with torch.device("meta"):
        classifier = Classifier(config.model, 1000).eval()
        assert classifier(torch.empty(1, 3, config.transform.size, config.transform.size)).shape == (1, 1000)
    # the sizes of TensorFlow's public networks
    published = {1.0: 3.47e6, 0.75: 2.61e6, 0.5: 1.95e6, 0.35: 1.66e6}[config.model.backbone.width]
    assert sum(parameter.numel() for parameter in classifier.parameters()) == pytest.approx(published, rel=0.02)


@pytest.mark.slow
@needs_shared("weights/mobilenet_v2_torchvision_layout.pt", "data/clothing_cc0")
def test_real_images_and_weights_go_through(tmp_path: Path) -> None:
    """One short epoch at a small size; the accuracy of the recipe itself is in the README."""
    data = SHARED / "data" / "clothing_cc0"
    weights = SHARED / "weights" / "mobilenet_v2_torchvision_layout.pt"
    more = ["--weights", str(weights), "--model.backbone.width", "1.0", "--train.epochs", "1", "--train.batch-size", "32",
            "--transform.size", "64", "--transform.eval-size", "96", "--model.backbone.frozen-stages", "3"]  # fmt: skip
    result = main(arguments((data / "train", data / "test"), tmp_path / "run", *more))
    assert result.metrics["top1"] > 0.35, "chance is 0.1"
