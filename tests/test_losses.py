"""The loss against a slow loop that a person can read. Run: pytest tests/test_losses.py"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from detection.boxes import cxcywh_to_xyxy
from detection.models.box_coders import SSDBoxCoder
from detection.models.litedet import LiteDetConfig
from detection.models.ssdlite import SSDLiteConfig
from detection.structures import RawPredictions, Target
from detection.training.assignment import MatcherConfig, SSDAssigner
from detection.training.losses import TrainingStep, normaliser_over_processes
from detection.training.ssd_loss import SSDLoss, SSDLossConfig


def loss_slowly(config: SSDLossConfig, raw: RawPredictions, target: Target, first_column: int) -> dict[str, float]:
    """One image after the other, one anchor after the other."""
    positives, box, classification = 0, 0.0, 0.0
    for b in range(len(raw.class_logits)):
        boxes, labels = target.boxes[b, target.valid[b]], target.labels[b, target.valid[b]]
        matches = SSDAssigner(config.matcher).match(
            boxes[None], torch.ones(1, len(boxes), dtype=torch.bool), raw.anchors
        )
        owner = {a: int(matches.objects[0, a]) for a in range(len(raw.anchors)) if matches.positive[0, a]}
        positives += len(owner)
        for a, m in owner.items():
            code = SSDBoxCoder().encode(boxes[m], raw.anchors[a])
            for predicted, wanted in zip(raw.codes[b, a], code, strict=True):
                error = abs(float(predicted - wanted))
                box += (
                    0.5 * error**2 / config.smooth_l1_beta
                    if error < config.smooth_l1_beta
                    else error - config.smooth_l1_beta / 2
                )
        columns = {a: int(labels[m]) + first_column for a, m in owner.items()}
        logits = raw.class_logits[b]
        if config.classification == "cross_entropy":
            surprise = {a: -float(logits[a].log_softmax(0)[columns.get(a, 0)]) for a in range(len(logits))}
            negatives = sorted((a for a in surprise if a not in owner), key=lambda a: -surprise[a])
            wanted_negatives = max(config.negatives_per_positive * len(owner), config.min_negatives)
            counted = [*owner, *negatives[: int(wanted_negatives)]]
            classification += sum(surprise[a] for a in counted)
        else:
            for a in range(len(logits)):
                for c in range(logits.shape[1]):
                    is_it = (columns.get(a) if first_column == 0 else columns.get(a, 0)) == c
                    p = 1 / (1 + math.exp(-float(logits[a, c])))
                    alpha = config.focal_alpha if is_it else 1 - config.focal_alpha
                    p = p if is_it else 1 - p
                    classification -= alpha * (1 - p) ** config.focal_gamma * math.log(p)
    normaliser = max(positives, 1)
    return {
        "loss_box": box / normaliser,
        "loss_class": classification / normaliser,
        "positives": positives / len(raw.class_logits),
    }


def drawn(num_objects: int, columns: int, seed: int = 0) -> tuple[RawPredictions, Target]:
    torch.manual_seed(seed)
    anchors = cxcywh_to_xyxy(torch.rand(80, 4) * torch.tensor([100.0, 100, 40, 40]) + 5)
    raw = RawPredictions(torch.randn(4, 80, 4) * 2, torch.randn(4, 80, columns), anchors)
    boxes = cxcywh_to_xyxy(torch.rand(4, num_objects, 4) * torch.tensor([100.0, 100, 30, 30]) + 5)
    valid = torch.rand(4, num_objects) < 0.7
    valid[2] = False  # an image without objects
    labels = torch.randint(0, 3, (4, num_objects))
    return raw, Target(boxes * valid[..., None], labels * valid, valid)


CONFIGS = [
    (SSDLossConfig(), True),
    (SSDLossConfig(negatives_per_positive=2.5, min_negatives=0, smooth_l1_beta=0.5), True),
    (SSDLossConfig(classification="focal"), False),
    (SSDLossConfig(classification="focal", focal_alpha=0.6, focal_gamma=1.5), True),
]


@pytest.mark.parametrize(("config", "background"), CONFIGS)
@pytest.mark.parametrize("num_objects", [0, 1, 6])
def test_batch_equals_the_slow_loop(config: SSDLossConfig, background: bool, num_objects: int) -> None:
    raw, target = drawn(num_objects, 3 + background)
    losses = SSDLoss(config, SSDBoxCoder(), background)(raw, target)
    expected = loss_slowly(config, raw, target, int(background))
    assert {name: losses[name].item() for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert losses["loss"].item() == pytest.approx(expected["loss_box"] + expected["loss_class"], rel=1e-4)


class _Stub(torch.nn.Module):
    """Gives the same whatever it is asked."""

    def __init__(self, gives: object) -> None:
        super().__init__()
        self.gives = gives

    def forward(self, *_: object) -> object:
        return self.gives


def test_a_step_adds_what_a_teacher_asks_and_counts_positives_for_each_object() -> None:
    losses = {"loss": torch.tensor(2.0), "positives": torch.tensor(3.0)}  # 3 an image
    more = {"teacher": torch.tensor(0.5), "teacher_boxes": torch.tensor(0.25)}
    images, boxes, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, 4, 4), torch.zeros(2, 4, dtype=torch.int64)
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    alone = TrainingStep(_Stub(None), _Stub(losses))(images, boxes, labels, valid)  # type: ignore[arg-type]
    assert (alone["loss"].item(), alone["positives_per_object"].item()) == (2.0, 1.5)  # 6 of the batch's 4 objects
    taught = TrainingStep(_Stub(None), _Stub(losses), _Stub(more))(images, boxes, labels, valid[:, :0])  # type: ignore[arg-type]
    assert taught["loss"].item() == 2.75
    assert taught["teacher"].item() == 0.5
    assert taught["positives_per_object"].item() == 6.0  # a batch without objects


def test_by_hand() -> None:
    # One anchor fits its object exactly, the others are far away. Uniform logits of 3 columns: each counted anchor costs ln 3.
    # 1 positive and 3 of the 5 negatives: (1 + 3) ln 3. The box code is off by 0.5 in one number: 0.5 * 0.5^2.
    anchors = torch.tensor([[0.0, 0, 10, 10]] + [[100.0, 0, 110, 10]] * 5)
    encodings = torch.zeros(1, 6, 4)
    encodings[0, 0, 2] = 0.5
    raw = RawPredictions(encodings, torch.zeros(1, 6, 3), anchors)
    target = Target(anchors[None, :1], torch.tensor([[1]]), torch.tensor([[True]]))
    losses = SSDLoss(SSDLossConfig(min_negatives=0), SSDBoxCoder(), True)(raw, target)
    assert losses["loss_class"].item() == pytest.approx(4 * math.log(3))
    assert losses["loss_box"].item() == pytest.approx(0.125)
    weighted = SSDLoss(SSDLossConfig(min_negatives=0, box_weight=2.0, classification_weight=0.5), SSDBoxCoder(), True)
    assert weighted(raw, target)["loss"].item() == pytest.approx(0.25 + 2 * math.log(3))


@pytest.mark.parametrize(("own", "others", "expected"), [(3.0, 5.0, 2.0), (0.1, 0.2, 0.25), (0.0, 1.5, 0.375)])
def test_the_normaliser_is_the_mean_over_processes(
    own: float, others: float, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four, whose parts count as at least 1 together; test_processes.py has real ones."""
    assert normaliser_over_processes(torch.tensor(own)).item() == max(own, 1.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr("torch.distributed._functional_collectives.all_reduce", lambda value, op, group: value + others)
    assert normaliser_over_processes(torch.tensor(own)).item() == pytest.approx(expected)


def test_the_defaults_are_those_of_the_papers() -> None:
    # SSD: three negatives for each positive, the parts added as they are, smooth L1 from 1. RetinaNet: alpha 0.25, gamma 2.
    config = SSDLossConfig()
    assert (config.negatives_per_positive, config.min_negatives, config.smooth_l1_beta) == (3.0, 3, 1.0)
    assert (config.box_weight, config.classification_weight, config.label_smoothing) == (1.0, 1.0, 0.0)
    assert (config.focal_alpha, config.focal_gamma) == (0.25, 2.0)


def test_a_image_without_objects_teaches_background() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10], [30, 0, 40, 10]])
    logits = torch.zeros(1, 4, 2, requires_grad=True)
    raw = RawPredictions(torch.zeros(1, 4, 4), logits, anchors)
    target = Target(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 0, dtype=torch.bool))
    losses = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(raw, target)
    assert losses["loss_box"].item() == 0
    assert losses["loss_class"].item() == pytest.approx(3 * math.log(2))  # min_negatives
    losses["loss"].backward()
    assert logits.grad is not None
    assert (logits.grad[..., 0] < 0).sum() == 3  # towards background
    silent = SSDLoss(SSDLossConfig(min_negatives=0), SSDBoxCoder(), True)(raw, target)
    assert silent["loss"].item() == 0


def test_the_hardest_negatives_are_taken() -> None:
    # Negatives look like background to a falling degree: 5 > 3 > 1 > -1 > -3.
    loss = SSDLoss(SSDLossConfig(min_negatives=2, negatives_per_positive=0), SSDBoxCoder(), True)
    logits = torch.zeros(1, 5, 2)
    logits[0, :, 0] = torch.tensor([5.0, 3, 1, -1, -3])
    positive = torch.tensor([[False, False, False, False, True]])
    assert loss.hard_negatives(logits, positive).tolist() == [[False, False, True, True, False]]


def test_label_smoothing_is_torchs() -> None:
    raw, target = drawn(3, 4)
    everything = SSDLossConfig(min_negatives=1000, label_smoothing=0.1)
    losses = SSDLoss(everything, SSDBoxCoder(), True)(raw, target)
    matches = SSDAssigner(MatcherConfig()).match(target.boxes, target.valid, raw.anchors)
    columns = torch.where(matches.positive, target.labels.gather(1, matches.objects) + 1, 0)
    expected = F.cross_entropy(raw.class_logits.flatten(0, 1), columns.flatten(), reduction="sum", label_smoothing=0.1)
    assert losses["loss_class"].item() == pytest.approx(expected.item() / matches.positive.sum().item(), rel=1e-5)


def test_gradients_are_finite_for_wild_predictions_and_thin_boxes() -> None:
    raw, target = drawn(4, 4)
    wild = RawPredictions((raw.codes * 1e4).requires_grad_(), (raw.class_logits * 1e3).requires_grad_(), raw.anchors)
    boxes: Tensor = target.boxes.clone()
    boxes[..., 2] = boxes[..., 0]  # no width at all: a reader lets none of these through, the loss survives one
    loss = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(wild, target._replace(boxes=boxes))["loss"]
    loss.backward()
    assert loss.isfinite()
    assert wild.codes.grad is not None
    assert wild.codes.grad.isfinite().all()


class NoteShapes(TorchDispatchMode):
    """Notes the type and shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, torch.dtype, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.made.append((func.name(), out.dtype, tuple(out.shape)))
        return out


def test_targets_of_the_focal_loss_take_no_more_memory_than_the_logits() -> None:
    raw, target = drawn(3, 5)
    with NoteShapes() as noted:
        SSDLoss(SSDLossConfig(classification="focal"), SSDBoxCoder(), True)(raw, target)
    assert [one for one in noted.made if one[2] == raw.class_logits.shape and one[1] == torch.int64] == []


def test_mining_computes_no_probability_but_the_background() -> None:
    raw, target = drawn(3, 4)
    loss = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)
    with NoteShapes() as noted:
        loss.hard_negatives(raw.class_logits, target.valid.new_zeros(4, 80))
    assert not any("log_softmax" in name for name, _, _ in noted.made)


def test_half_precision_predictions_are_taken_in_float32() -> None:
    raw, target = drawn(4, 4)
    half = RawPredictions(raw.codes.bfloat16(), raw.class_logits.bfloat16(), raw.anchors)
    losses = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(half, target)
    assert losses["loss"].dtype == torch.float32
    expected = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(raw, target)
    assert losses["loss"].item() == pytest.approx(expected["loss"].item(), rel=0.02)


@pytest.mark.parametrize(
    ("config", "background", "message"),
    [
        (SSDLossConfig(), False, "cross_entropy needs a background column"),
        (SSDLossConfig(negatives_per_positive=-1), True, "must not be negative"),
        (SSDLossConfig(min_negatives=-1), True, "must not be negative"),
        (SSDLossConfig(label_smoothing=1.0), True, r"label_smoothing must be in \[0, 1\), got 1.0"),
        (SSDLossConfig(classification="focal", label_smoothing=0.1), True, "belongs to cross_entropy"),
        (SSDLossConfig(smooth_l1_beta=0), True, "smooth_l1_beta must be positive"),
    ],
)
def test_configs_that_make_no_sense(config: SSDLossConfig, background: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SSDLoss(config, SSDBoxCoder(), background)


def test_a_loss_is_fitted_to_the_scores_of_the_network() -> None:
    softmax, sigmoid = SSDLiteConfig(score="softmax"), SSDLiteConfig(score="sigmoid")
    plain, focal = SSDLossConfig(), SSDLossConfig(classification="focal")
    plain.check(softmax)
    focal.check(sigmoid)
    for loss, model in ((plain, sigmoid), (focal, softmax)):
        with pytest.raises(ValueError, match=f"trains {loss.trains} scores, model.score is {model.score}"):
            loss.check(model)
    with pytest.raises(ValueError, match="trains SSD's box codes, which a model of kind litedet does not give"):
        focal.check(LiteDetConfig())  # type: ignore[arg-type]
    assert plain.fitted(softmax) == (plain, "")
    assert focal.fitted(softmax) == (plain, "loss.classification is cross_entropy now, which trains softmax scores")
    assert plain.fitted(sigmoid) == (focal, "loss.classification is focal now, which trains sigmoid scores")
    fitted, remark = SSDLossConfig(label_smoothing=0.1).fitted(sigmoid)
    assert fitted == focal
    assert remark.endswith("; loss.label_smoothing 0.1, which belongs to cross_entropy, is 0")


def _loss_of_share(rank: int, world_size: int, file: str, results: "torch.multiprocessing.SimpleQueue[float]") -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    raw, target = drawn(6, 4)
    share = slice(rank, None, world_size)
    part = RawPredictions(raw.codes[share], raw.class_logits[share], raw.anchors)
    loss = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(part, Target(*(field[share] for field in target)))["loss"]
    results.put(loss.item())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_with_half_a_batch_average_to_the_whole(tmp_path: "object") -> None:
    # DDP averages gradients, so the mean of the processes' losses must be the loss of the whole batch.
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    torch.multiprocessing.spawn(_loss_of_share, args=(2, f"{tmp_path}/rendezvous", results), nprocs=2)
    raw, target = drawn(6, 4)
    whole = SSDLoss(SSDLossConfig(), SSDBoxCoder(), True)(raw, target)["loss"].item()
    assert (results.get() + results.get()) / 2 == pytest.approx(whole, rel=1e-5)
