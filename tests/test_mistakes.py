"""What a user is told who asks for what makes no sense: one line, before anything is done. Run: pytest tests/test_mistakes.py"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from backbones.errors import UserError
from backbones.weights.info import WeightsInfo
from backbones.weights.readers import read_metadata
from detection.checks.sources import read_splits
from detection.cli import check, eval, predict, report, video
from detection.data.augment import AugmentConfig
from detection.engine.plain import differences, to_plain
from detection.images.decode import EncodedImage, UnreadableImageError, read_image
from detection.inference.predictor import load_detector
from detection.models.ssdlite import SSDLiteConfig

EVAL = ["detector.safetensors", "--annotations", "a.json", "--images", "images"]
VIDEO = ["detector.safetensors", "--source", "v.mp4", "--json", "o.jsonl"]


@pytest.mark.parametrize(
    ("main", "arguments", "told"),
    [
        (eval.main, EVAL[1:], "give a checkpoint to evaluate, or --from-predictions FILE, and not both"),
        (eval.main, EVAL[:3], "--images is missing: the folder of the images that the detector is to see"),
        (
            eval.main,
            [*EVAL[1:], "--from-predictions", "r", "--predictions", "p"],
            "--predictions writes what a checkpoint",
        ),
        (eval.main, [*EVAL, "--against", "none.json"], "--against none.json: there is no such file"),
        (eval.main, [*EVAL, "--against-runner", "torch"], "--against-runner says what runs the network of --against"),
        (eval.main, [*EVAL[1:3], "--from-predictions", "r", "--against", "d.pt"], "that the other detector is to see"),
        (
            eval.main,
            [*EVAL[1:3], "--from-predictions", "r", "--write-thresholds", "t.pt"],
            "needs a checkpoint to write",
        ),
        (eval.main, [*EVAL, "--write-thresholds", "t.pt"], "give the file the ending .safetensors"),
        (eval.main, ["d.onnx", *EVAL[1:], "--write-thresholds", "t.safetensors"], "d.onnx is an exported file"),
        (eval.main, [*EVAL, "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (eval.main, [*EVAL, "--workers", "-1"], "--workers must not be negative, got -1"),
        (video.main, VIDEO[:3], "nothing would come of it: give --out VIDEO.mp4, --json FILE.jsonl or --show"),
        (video.main, [*VIDEO, "--score", "2"], "--score 2.0: a score lies between 0 and 1"),
        (video.main, [*VIDEO, "--slice", "31"], "--slice 31: a slice has at least 32 pixels"),
        (video.main, [*VIDEO, "--count", "1", "2", "1", "2"], "--count: a line has two different ends"),
        (video.main, [*VIDEO, "--against", "b.pt", "--track"], "--against shows two detectors side by side"),
        (video.main, [*VIDEO, "--max-frames", "0"], "--max-frames 0: must be at least 1"),
        (check.main, [], "nothing to check: give a COCO json, or a folder of VOC's or YOLO's files"),
        (check.main, ["a.json", "--fix", "b.json", "c.json"], "--fix has 2 files for 1 splits; give one for each"),
        (check.main, ["a.json", "--workers", "-1"], "--workers must not be negative, got -1"),
        (report.main, ["none"], "none"),
        (predict.main, ["none.pt", "--source", "none", "--out", "o"], "none: no such folder, pattern or list"),
    ],
)
def test_arguments(
    main: Callable[[list[str]], Any], arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"horizontal_flip": 1.5}, "augment.horizontal_flip is 1.5; it lies between 0 and 1"),
        ({"hue": 0.6}, "augment.hue is 0.6; it lies between 0 and 0.5"),
        ({"expand_max_scale": 0.5}, "augment.expand_max_scale is 0.5; it is at least 1"),
        ({"crop_scale": (0.5, 0.3)}, r"augment.crop_scale is \(0.5, 0.3\); two numbers with 0 < first <= second <= 1"),
        ({"crop_aspect": (0.0, 1.0)}, r"augment.crop_aspect is \(0.0, 1.0\); two numbers with 0 < first <= second"),
        ({"crop_min_overlaps": ()}, r"augment.crop_min_overlaps is \(\); one or more numbers in 0 <= x < 1"),
        ({"crop_min_overlaps": (1.0,)}, r"augment.crop_min_overlaps is \(1.0,\)"),
        ({"min_size": 0.0}, "augment.min_size is 0.0; it is above 0 pixels"),
        ({"crop_scale": (1.0, 1.0), "crop_aspect": (1.0, 1.0), "hue": 0.5, "expand_max_scale": 1.0}, None),
    ],
)
def test_augmentation(changes: dict[str, Any], told: str | None) -> None:
    config = replace(AugmentConfig(), **changes)
    if told is None:
        config.validate()
        assert config.hue == 0.5
    else:
        with pytest.raises(UserError, match=told):
            config.validate()


def test_datasets_to_check(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text("")
    cases: list[tuple[Sequence[Path], Sequence[Path], dict[str, Any], str]] = [
        ([empty], [], {}, "--images is missing: the folder of the images of"),
        ([empty], [empty], {}, "has neither XML files .* nor text files"),
        ([empty, empty], [empty, empty, empty], {}, "--images has 3 folders for 2 datasets"),
        ([empty, empty, empty], [empty], {"lists": [empty, empty]}, "--list has 2 files for 3 datasets"),
        ([tmp_path / "a.json"], [empty], {"lists": [empty]}, "--list belongs to folders of Pascal VOC"),
        ([tmp_path / "labels"], [empty], {}, "--names is missing: the class names of the YOLO files"),
    ]
    for paths, images, more, told in cases:
        with pytest.raises(UserError, match=told):
            read_splits(paths, images, **more)
    with pytest.raises(FileNotFoundError, match=r"image folder .*none does not exist or is not a folder"):
        read_splits([empty], [tmp_path / "none"])


def test_options_that_an_exported_file_does_not_have(tmp_path: Path) -> None:
    path = tmp_path / "d.onnx"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="an exported file has one input size"):
        load_detector(path, input_size=320)
    for amp in ("bf16", "fp16"):
        with pytest.raises(UserError, match="runs on the CPU in the numbers that it was exported with"):
            load_detector(path, amp=amp)  # type: ignore[arg-type]


def test_images_that_are_not_what_their_header_says(tmp_path: Path) -> None:
    encoded = cv2.imencode(".jpg", np.zeros((40, 60, 3), np.uint8))[1].tobytes()
    image = tmp_path / "a.jpg"
    image.write_bytes(encoded)
    opened = EncodedImage(image)
    opened.header = opened.header._replace(size=(41, 60))
    with pytest.raises(UnreadableImageError, match="decodes to 60x40 pixels, its header says 60x41"):
        opened.decode()
    place = encoded.index(b"\xff\xc0")  # the frame's header: marker, length, depth, height, width
    image.write_bytes(encoded[: place + 5] + b"\0\0" + encoded[place + 7 :])
    with pytest.raises(UnreadableImageError, match="does not decode"):
        read_image(image)
    with pytest.raises(UnreadableImageError, match="is no file name"):
        read_image("a\0.jpg")
    floats = tmp_path / "f.tiff"
    assert cv2.imwrite(str(floats), np.zeros((4, 4, 3), np.float32))
    with pytest.raises(UnreadableImageError, match=r"f\.tiff: "):
        read_image(floats)


def test_a_marker_without_a_length_and_filling_bytes_are_passed_over(tmp_path: Path) -> None:
    encoded = cv2.imencode(".jpg", np.full((40, 60, 3), 200, np.uint8))[1].tobytes()
    # ITU T.81, B.1.1.2: any number of FF may stand before a marker; TEM (01) has no length.
    (tmp_path / "a.jpg").write_bytes(encoded[:2] + b"\xff\xff\xff\x01" + encoded[2:])
    assert EncodedImage(tmp_path / "a.jpg").header.size == (40, 60)


def test_metadata_of_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"no header")
    with pytest.raises(UserError, match="is not a safetensors file that can be read"):
        read_metadata(tmp_path / "a.safetensors")


def test_configs_as_plain_data() -> None:
    with pytest.raises(NotImplementedError, match="a config must not hold a Tensor"):
        to_plain(WeightsInfo(source=torch.zeros(1)))  # type: ignore[arg-type]
    one, other = SSDLiteConfig(), SSDLiteConfig(input_size=(96, 128))
    assert [str(change) for change in differences(one, other)] == ["input_size (96, 128)"]
    assert differences(one, one) == []
    inner = replace(one, backbone=replace(one.backbone, width=0.5))
    assert [str(change) for change in differences(one, inner)] == ["backbone.width 0.5"]
