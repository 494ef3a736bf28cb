"""Learning from a teacher. Run: pytest tests/test_distillation.py"""

import json
import math
from pathlib import Path

import pytest
import torch
from fake_cuda import needs_indexing
from test_litedet import NAMES, SMALL, small_litedet
from test_model import training_batch
from torch._subclasses.fake_tensor import FakeTensorMode

from detection.cli.train import main as train_det
from detection.data.drawn import draw_detection_set
from detection.models.litedet import LiteDet, LiteDetConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import RawPredictions
from detection.training.distillation import Distillation, DistillationConfig, read_teacher
from detection.training.litedet_loss import LiteDetLossConfig
from detection.training.losses import TrainingStep
from detection.weights.info import DetectorInfo
from detection.weights.native import save_detector

SSD = SSDLiteConfig(backbone=SMALL.backbone, input_size=(96, 128))


def teacher_file(folder: Path) -> Path:
    save_detector(folder / "teacher.safetensors", *small_litedet())
    return folder / "teacher.safetensors"


def test_a_student_that_says_the_same_has_nothing_to_learn(tmp_path: Path) -> None:
    teacher, columns = read_teacher(teacher_file(tmp_path), SMALL, NAMES)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    losses = Distillation(DistillationConfig(), teacher, columns)(images, teacher(images))
    assert losses["loss_distilled_box"].item() == pytest.approx(0, abs=1e-5)
    assert losses["loss_distilled_class"].item() == pytest.approx(0, abs=1e-5)


def test_the_loss_equals_a_slow_loop_and_classes_are_matched_by_name(tmp_path: Path) -> None:
    teacher, columns = read_teacher(teacher_file(tmp_path), SMALL, NAMES[::-1])
    assert columns.tolist() == [1, 0]
    config = DistillationConfig(class_weight=2.0, box_weight=3.0, temperature=1.5)
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    said = teacher(images)
    raw = RawPredictions(torch.randn_like(said.codes), torch.randn_like(said.class_logits), said.anchors)
    losses = Distillation(config, teacher, columns)(images, raw)
    weights, class_sum, box_sum = 0.0, 0.0, 0.0
    for b in range(2):
        for a in range(len(said.anchors)):
            scores = said.class_logits[b, a].sigmoid().tolist()[::-1]
            weights += max(scores)
            for t, x in zip(scores, raw.class_logits[b, a].tolist(), strict=True):
                s = 1 / (1 + math.exp(-x))
                class_sum += (t - s) ** 2 * -(t * math.log(s) + (1 - t) * math.log(1 - s))
            p = (said.codes[b, a].view(4, 8) / 1.5).softmax(-1)
            q = (raw.codes[b, a].view(4, 8) / 1.5).softmax(-1)
            box_sum += max(scores) * 1.5**2 * float((p * (p / q).log()).sum()) / 4
    assert losses["loss_distilled_class"].item() == pytest.approx(2 * class_sum / weights, rel=1e-3)
    assert losses["loss_distilled_box"].item() == pytest.approx(3 * box_sum / weights, rel=1e-3)


def test_softmax_scores_and_plain_box_codes_by_hand() -> None:
    torch.manual_seed(0)
    teacher = SSDLite(SSD, 2).eval()
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    with torch.no_grad():
        said = teacher(images)
        raw = RawPredictions(said.codes + 2.0, torch.randn_like(said.class_logits), said.anchors)
        losses = Distillation(DistillationConfig(), teacher, torch.arange(3))(images, raw)
    p, q = said.class_logits[0].softmax(-1), raw.class_logits[0].softmax(-1)
    weight = p[:, 1:].amax(-1)
    expected = ((p * (p / q).log()).sum(-1) * weight).sum() / weight.sum()
    assert losses["loss_distilled_class"].item() == pytest.approx(expected.item(), rel=1e-4)
    assert losses["loss_distilled_box"].item() == pytest.approx(4 * 1.5, rel=1e-4)  # 2 - 1/2, four numbers


@pytest.mark.parametrize(
    ("student", "names", "message"),
    [
        (SSD, NAMES, "is of kind litedet, the student of kind ssdlite; they must be of one kind"),
        (SMALL, ("cat", "horse"), "has the classes cat, dog; the training data has cat, horse"),
        (SMALL, ("cat",), "has the classes cat, dog; the training data has cat. "),
        (SMALL.replaced(bins=4), NAMES, r"\(256 anchors with 32 numbers, the student 256 with 16\)"),
        (SMALL.replaced(first_bin=0.0), NAMES, "other anchors or another box code"),
        (SMALL.replaced(features=("stage5", "stage7")), NAMES, "the student 64 with 32"),
        (SMALL.replaced(resize="letterbox"), NAMES, "set --model.resize stretch"),
    ],
)
def test_teachers_that_cannot_teach(
    tmp_path: Path, student: LiteDetConfig, names: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_teacher(teacher_file(tmp_path), student, names)


def test_the_teacher_stays_as_it_is_and_is_not_trained(tmp_path: Path) -> None:
    teacher, columns = read_teacher(teacher_file(tmp_path), SMALL.replaced(input_size=(128, 128)), NAMES)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    student = LiteDet(SMALL.replaced(input_size=(128, 128), one_to_one=True), 2)
    distillation = Distillation(DistillationConfig(), teacher, columns)
    step = TrainingStep(student, LiteDetLossConfig().build(student), distillation).train()
    losses = step(*training_batch(2, 3))
    losses["loss"].backward()
    assert losses["loss"].item() == pytest.approx(
        losses["loss_class"].item()
        + 2 * losses["loss_box"].item()
        + 0.25 * losses["loss_distribution"].item()
        + losses["loss_one_to_one"].item()
        + losses["loss_distilled_class"].item()
        + losses["loss_distilled_box"].item(),
        rel=1e-4,
    )
    assert {id(p) for p in step.parameters() if p.requires_grad} == {id(p) for p in student.parameters()}
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name


@needs_indexing
def test_a_step_with_a_teacher_makes_no_round_trip() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False), torch.device("cuda"):
        config = SMALL.replaced(input_size=(128, 128))
        student, teacher = LiteDet(config, 3), LiteDet(config, 3).eval().requires_grad_(False)
        distillation = Distillation(DistillationConfig(), teacher, torch.arange(3))
        step = TrainingStep(student, LiteDetLossConfig().build(student), distillation)
        assert step(*training_batch(2, 3, "cuda"))["loss"].device.type == "cuda"


@pytest.mark.slow
def test_a_training_with_a_teacher(tmp_path: Path) -> None:
    drawn = draw_detection_set(tmp_path / "drawn", 4, 2, (128, 128), 0)
    names = tuple(one["name"] for one in json.loads(drawn.train_annotations.read_text())["categories"])
    model = LiteDet(SMALL, len(names))
    ids = tuple(range(1, len(names) + 1))
    info = DetectorInfo(model=model.config, postprocess=PostprocessConfig(), class_names=names, category_ids=ids)
    save_detector(tmp_path / "teacher.safetensors", model, info)
    files = ["--data.train.annotations", drawn.train_annotations, "--data.train.images", drawn.train_images]
    files += ["--data.val.annotations", drawn.val_annotations, "--data.val.images", drawn.val_images]
    options = (
        "--model.backbone.width 0.35 --model.backbone.frozen-stages 0 --model.input-size 96 96 --train.batch-size 2"
    )
    options += " --train.epochs 1 --data.workers 0 --train.device cpu --model.neck-width 16 --train.log-every 1"
    recipe = f"{Path(__file__).resolve().parents[1]}/configs/finetune.py:litedet"
    run = ["--run-dir", str(tmp_path / "run"), "--teacher", str(tmp_path / "teacher.safetensors")]
    train_det([recipe, *map(str, files), *run, *options.split()])
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["losses"]["loss_distilled_class"] > 0
    assert record["losses"]["loss_distilled_box"] > 0
