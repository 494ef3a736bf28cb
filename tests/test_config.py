"""Recipes, overrides, plain data. Run: pytest tests/test_config.py"""

import dataclasses
import importlib
import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import pytest

from backbones.errors import UserError
from backbones.mobilenetv2 import PAPER_SETTINGS
from detection.cli.recipes import load_config
from detection.engine.plain import from_plain, to_plain
from detection.models.build import build_detector
from detection.models.ssdlite import SSDLiteConfig
from detection.training.config import DetectionConfig
from detection.training.ssd_loss import SSDLossConfig

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
        load_config([str(ROOT / "configs/finetune.py:ssdlite"), *override], "test")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    if said == "stretch" and version("tyro").startswith("0."):
        pytest.skip("tyro names the choices from 1.0 on")
    assert said in printed.err + printed.out


def test_help_lists_fields_with_their_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load_config([str(ROOT / "configs/finetune.py:ssdlite"), "--help"], "Train a detector.")
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


@dataclasses.dataclass(kw_only=True, slots=True)
class Inner:
    renamed_fields: ClassVar[dict[str, str | None]] = {"speed": "lr", "verbose": None}
    lr: float = 0.1
    """The learning rate."""


@dataclasses.dataclass(kw_only=True, slots=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)
    perhaps: Inner | None = None
    path: Path = Path("a")


def test_a_field_that_nobody_knows_is_refused_with_file_and_place() -> None:
    for plain, place in (
        ({"inner": {"learning_rate": 1.0}}, "inner.learning_rate of Inner"),
        ({"perhaps": {"x": 1.0}}, "perhaps.x of Inner"),
        ({"other": 1}, "other of Outer"),
    ):
        with pytest.raises(UserError, match=rf"^run/config\.json: unknown field {place}"):
            from_plain(plain, Outer, source="run/config.json")


def test_a_renamed_field_keeps_its_value() -> None:
    read = from_plain({"inner": {"speed": 0.5, "verbose": 3}, "perhaps": {"speed": 2}, "path": "b"}, Outer)
    assert read == Outer(inner=Inner(lr=0.5), perhaps=Inner(lr=2.0), path=Path("b"))
    with pytest.raises(UserError, match=r"inner\.lr is there twice"):
        from_plain({"inner": {"speed": 0.5, "lr": 0.5}}, Outer)


def test_the_record_of_a_training_of_the_first_version_is_read() -> None:
    """Every field as the first version wrote it, with values that are not the defaults."""
    config = DetectionConfig.from_plain(FIRST_VERSION, "config.json")
    config.validate()
    assert isinstance(config.model, SSDLiteConfig)
    assert config.model.anchors.min_scale == 0.1
    assert config.model.backbone.frozen_stages == 3
    assert isinstance(config.loss, SSDLossConfig)
    assert config.loss.matcher.forced_rounds == 2
    assert config.augment.crop_min_overlaps == (0.0,)
    assert config.train.optim.warmup_steps == 100
    assert config.train.epochs == 2
    model = FIRST_VERSION["model"] | {"anchors": {"min_size": 0.1}}
    with pytest.raises(UserError, match=r"config\.json: unknown field model\.anchors\.min_size of AnchorConfig"):
        DetectionConfig.from_plain(FIRST_VERSION | {"model": model}, "config.json")


# What commit 3b4a398 wrote: no ``kind`` anywhere.
FIRST_VERSION: dict[str, Any] = {
    "run_dir": "runs/detector",
    "weights": "mobilenet_v2.pt",
    "weights_part": "all",
    "backbone_lr_scale": 1.0,
    "model": {
        "backbone": {
            "width": 1.0,
            "settings": [list(row) for row in PAPER_SETTINGS],
            "last_channels": 1280,
            "fixed_ends": False,
            "residual": "identity",
            "padding": "symmetric",
            "norm_eps": 1e-05,
            "norm_momentum": 0.1,
            "frozen_stages": 3,
            "freeze_norm": False,
        },
        "input_size": [128, 128],
        "resize": "stretch",
        "features": ["stride16_expansion", "last"],
        "extra_channels": [512, 256, 256, 128],
        "anchors": {
            "min_scale": 0.1,
            "max_scale": 0.95,
            "scales": None,
            "ratios": [1.0, 2.0, 0.5, 3.0, 0.3333333333333333],
            "reduce_first_map": False,
            "centre_steps": None,
        },
        "score": "softmax",
        "background_column": True,
        "norm_eps": 0.001,
        "norm_momentum": 0.03,
        "init_std": 0.03,
        "prior": 0.01,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    },
    "loss": {
        "classification": "cross_entropy",
        "matcher": {"iou_threshold": 0.5, "forced_rounds": 2},
        "negatives_per_positive": 3.0,
        "min_negatives": 3,
        "box_weight": 1.0,
        "classification_weight": 1.0,
        "smooth_l1_beta": 1.0,
        "label_smoothing": 0.0,
        "focal_alpha": 0.25,
        "focal_gamma": 2.0,
    },
    "postprocess": {"score_threshold": 0.001, "nms_threshold": 0.55, "candidates": 1000, "max_detections": 300},
    "augment": {
        "expand_probability": 0.3,
        "expand_max_scale": 1.5,
        "crop_probability": 0.7,
        "crop_min_overlaps": [0.0],
        "crop_scale": [0.6, 1.0],
        "crop_aspect": [0.5, 2.0],
        "horizontal_flip": 0.5,
        "vertical_flip": 0.0,
        "quarter_turns": 0.0,
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.1,
        "hue": 0.02,
        "color_probability": 0.5,
        "channel_shuffle": 0.0,
        "min_visible": 0.3,
        "min_size": 1.0,
    },
    "data": {
        "root": None,
        "train": {"annotations": "train.json", "images": "images"},
        "val": {"annotations": "val.json", "images": "images"},
        "workers": 2,
        "val_batch_size": 16,
    },
    "train": {
        "epochs": 2,
        "batch_size": 8,
        "accumulate": 1,
        "seed": 0,
        "optim": {
            "name": "adamw",
            "lr": 0.001,
            "momentum": 0.9,
            "nesterov": False,
            "beta2": 0.999,
            "weight_decay": 0.05,
            "warmup_steps": 100,
            "warmup_max_share": 0.1,
            "min_lr_share": 0.0,
            "clip_norm": 10.0,
        },
        "ema": {"enabled": True, "decay": 0.9998, "horizon_share": 0.05},
        "amp": "off",
        "channels_last": True,
        "compile": False,
        "sync_norm": True,
        "eval_every": 1,
        "log_every": 20,
        "max_skipped_share": 0.01,
        "num_threads": 1,
        "device": "auto",
        "resume": False,
    },
}
