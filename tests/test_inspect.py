from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from backbones.errors import UserError
from detection.checks.sheets import _COLOURS, _MISSED, Assigned, describe_assignment, positives_of_objects
from detection.cli.inspect import main
from detection.cli.recipes import load_config, read_recipe
from detection.data.coco import CocoIndex
from detection.data.drawn import draw_detection_set
from detection.engine.checkpoint import save_checkpoint
from detection.engine.plain import to_plain
from detection.models.build import build_detector
from detection.structures import Batch
from detection.training.assignment import Assignment
from detection.training.config import DetectionConfig
from detection.weights.info import DetectorInfo


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Where the drawn set lies, as arguments of a training."""
    drawn = draw_detection_set(tmp_path_factory.mktemp("drawn"), num_train=6, num_val=2, size=(96, 128))
    return ["--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)]


def batch_of(boxes: list[list[list[float]]]) -> Batch:
    M = max(map(len, boxes))
    padded = torch.zeros(len(boxes), M, 4)
    valid = torch.zeros(len(boxes), M, dtype=torch.bool)
    for row, own in enumerate(boxes):
        padded[row, : len(own)] = torch.tensor(own).reshape(-1, 4)
        valid[row, : len(own)] = True
    B = len(boxes)
    return Batch(
        images=torch.zeros(B, 3, 32, 32, dtype=torch.uint8), boxes=padded, labels=torch.zeros(B, M, dtype=torch.int64),
        valid=valid, image_ids=torch.arange(B), original_sizes=torch.full((B, 2), 32), placements=torch.zeros(B, 4),
    )  # fmt: skip


def test_positives_of_objects_by_hand() -> None:
    batch = batch_of([[[0, 0, 9, 9], [9, 9, 20, 20]], [], [[1, 1, 5, 5]]])
    positive = torch.tensor([[True, True, False, True], [False] * 4, [False] * 4])
    objects = torch.tensor([[1, 1, 0, 0], [0] * 4, [0] * 4])
    assigned = Assigned(
        assignment=Assignment(positive, objects, positive.float()), negatives=(~positive).numpy(),
        anchors=np.zeros((4, 4), np.float32), as_points=False,
    )  # fmt: skip
    assert positives_of_objects(batch, assigned).tolist() == [1, 2, 0]
    text = describe_assignment(batch, assigned)
    assert "3 images, 3 objects, 4 anchors an image" in text
    assert "median 1, 0 to 2; 1 objects have none" in text
    assert "nothing is there: 3 an image" in text


@pytest.mark.parametrize("recipe", ["finetune:ssdlite", "finetune:litedet"])
def test_sheets_of_both_kinds(
    recipe: str, drawn: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--model.input-size", "96", "128", "--model.backbone.frozen-stages", "0"]
    main([recipe, *drawn, *size, "--out", str(tmp_path), "--num-images", "4"])
    assert "4 images" in capsys.readouterr().out
    for name in ("augmented.jpg", "assignment.jpg"):
        sheet = cv2.imread(str(tmp_path / name))
        assert sheet.shape == (2 * 480 + 4, 2 * 640 + 4, 3)
        assert sheet.std() > 10


def test_wrong_numbers_are_refused(drawn: list[str]) -> None:
    for wrong in (["--num-images", "0"], ["--epoch", "-1"], ["--modell", "x"]):
        with pytest.raises(SystemExit) as stop:
            main(["finetune:ssdlite", *drawn, *wrong])
        assert stop.value.code == 2


def test_a_checkpoint_of_a_run_says_what_it_was_trained_on(drawn: list[str], tmp_path: Path) -> None:
    config: DetectionConfig = read_recipe("finetune:litedet")()
    config.model = config.model.replaced(input_size=(96, 128))
    config.data.train.annotations, config.data.train.images = Path(drawn[1]), Path(drawn[3])
    torch.manual_seed(0)
    names = CocoIndex.read(Path(drawn[1])).class_names
    model = build_detector(config.model, len(names))
    info = DetectorInfo(
        model=config.model, postprocess=config.postprocess, class_names=names, category_ids=tuple(range(len(names)))
    )
    content = {
        "weights": model.state_dict(),
        "extra": {"detector": info.to_plain()},
        "epoch": 1,
        "step": 1,
        "metrics": {},
    }
    save_checkpoint(tmp_path / "best.pt", {**content, "config": to_plain(config)})
    main([str(tmp_path / "best.pt"), "--out", str(tmp_path / "out"), "--num-images", "2"])
    sheet = cv2.imread(str(tmp_path / "out" / "assignment.jpg"))
    assert sheet.shape == (480, 2 * 640 + 4, 3)
    other = {
        **content,
        "config": to_plain(config),
        "extra": {"detector": {**info.to_plain(), "class_names": ["a"], "category_ids": [1]}},
    }
    save_checkpoint(tmp_path / "other.pt", {**other, "weights": build_detector(config.model, 1).state_dict()})
    with pytest.raises(SystemExit) as stop:  # its classes are not those of the file
        main([str(tmp_path / "other.pt"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    with pytest.raises(UserError, match=r"gone on with from its last\.pt"):  # a training needs more than that
        load_config([str(tmp_path / "best.pt")], "", DetectionConfig, DetectionConfig.from_plain)


def test_no_object_with_anchors_has_the_colour_of_one_without() -> None:
    assert len(_COLOURS) >= 20
    assert all(max(abs(a - b) for a, b in zip(colour, _MISSED, strict=True)) > 60 for colour in _COLOURS)
