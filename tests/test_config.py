"""Recipes, overrides, plain data. Run: pytest tests/test_config.py"""

import importlib
import inspect
import json
from pathlib import Path

import pytest

from detection.cli.recipes import load_config
from detection.engine.plain import from_plain, to_plain
from detection.models.build import build_detector
from detection.training.config import DetectionConfig

ROOT = Path(__file__).resolve().parents[1]


def recipes() -> list[str]:
    """FILE.py:FUNCTION of every recipe in configs/."""
    found = []
    for file in sorted((ROOT / "configs").glob("*.py")):
        module = importlib.import_module(f"configs.{file.stem}")
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                found.append(f"{file}:{name}")
    return found


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: Path(recipe).name)
def test_every_recipe_is_valid_and_survives_plain_data(recipe: str) -> None:
    weights = [] if "coco.py" in recipe else ["--weights", "FILE"]  # a recipe with frozen stages refuses to go without
    config = load_config([recipe, *weights], "test")
    config.validate()
    plain = to_plain(config)
    if not isinstance(config, DetectionConfig):
        assert from_plain(json.loads(json.dumps(plain)), type(config)) == config
    else:
        assert DetectionConfig.from_plain(json.loads(json.dumps(plain))) == config
        assert config.loss.build(build_detector(config.model, 3)) is not None


def test_overrides() -> None:
    config = load_config(
        [
            str(ROOT / "configs/coco.py:ssdlite_mnv2_320"),
            *("--train.epochs", "3", "--train.optim.lr", "0.5", "--model.input-size", "256", "384"),
            *("--data.root", "/data/coco", "--weights", "mine.safetensors", "--model.resize", "letterbox"),
            *("--train.compile", "True", "--model.backbone.width", "0.5"),
        ],
        "test",
    )
    assert config.train.epochs == 3
    assert config.train.optim.lr == 0.5
    assert config.model.input_size == (256, 384)
    assert config.model.resize == "letterbox"
    assert config.train.compile is True
    assert config.data.split("train")[1] == Path("/data/coco/train2017")
    assert config.weights == "mine.safetensors"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("--train.epoch", "3"), "--train.epochs"),  # the nearest name
        (("--train.epochs", "many"), "--train.epochs"),
        (("--model.resize", "crop"), "stretch"),
    ],
)
def test_what_it_does_not_know_is_refused(
    override: tuple[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config([str(ROOT / "configs/finetune.py:detector"), *override], "test")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert said in printed.err + printed.out


def test_help_lists_fields_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config([str(ROOT / "configs/finetune.py:detector"), "--help"], "Train a detector.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--train.epochs" in text
    assert "Passes over the training images" in text
    assert "--model.anchors.min-scale" in text


def test_without_a_recipe_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config([], "Train a detector.")
    assert stop.value.code == 2
    assert "RECIPE [--FIELD VALUE ...]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("configs/finetune.py", "names no recipe; give FILE:FUNCTION"),
        ("configs/nothing.py:detector", r"no recipe file configs/nothing\.py"),
        (str(ROOT / "configs/finetune.py:nothing"), "has no recipe 'nothing'; it has: .*detector"),
    ],
)
def test_no_such_recipe(spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([spec], "test")


def test_a_split_without_files_is_named() -> None:
    with pytest.raises(ValueError, match=r"no --data\.train\.annotations given"):
        DetectionConfig().data.split("train")


def test_values_that_do_not_go_together() -> None:
    config = DetectionConfig()
    config.model.score = "sigmoid"
    with pytest.raises(ValueError, match=r"cross_entropy trains softmax scores, model\.score is sigmoid"):
        config.validate()
    config = DetectionConfig(backbone_lr_scale=0)
    with pytest.raises(ValueError, match="backbone_lr_scale must be positive"):
        config.validate()
    config = DetectionConfig()
    config.data.workers = -1
    with pytest.raises(ValueError, match=r"data\.workers must be at least 0"):
        config.validate()


def test_plain_data_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no DetectionConfig: Expected `int`.*epochs"):
        from_plain({"train": {"epochs": "many"}}, DetectionConfig)
