"""From raw predictions to detections. Run: pytest tests/test_postprocess.py"""

import math

import pytest
import torch
from fake_cuda import needs_indexing
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from detection import postprocess
from detection.models.box_coders import SSDBoxCoder
from detection.postprocess import Postprocess, PostprocessConfig, to_image
from detection.structures import RawPredictions

ANCHORS = torch.tensor([[0.0, 0, 10, 10], [1, 0, 11, 10], [50, 50, 70, 90]])
WHOLE = torch.tensor([[1.0, 1, 0, 0]])
SIZE = torch.tensor([[100, 100]])


def softmax_logits(*scores: tuple[float, float]) -> Tensor:
    """Logits of background and two classes with these scores of the two."""
    return torch.tensor([[[1 - sum(s), *s] for s in scores]]).clamp(min=1e-9).log()


def run(config: PostprocessConfig, logits: Tensor, anchors: Tensor = ANCHORS) -> list[tuple[list[float], float, int]]:
    raw = RawPredictions(torch.zeros(1, len(anchors), 4), logits, anchors)
    (found,) = Postprocess(config, SSDBoxCoder(), "softmax", True, ("cat", "dog"))(raw, WHOLE, SIZE)
    assert found.class_names == ("cat", "dog")
    return [
        (b.tolist(), round(s.item(), 4), int(i))
        for b, s, i in zip(found.boxes, found.scores, found.labels, strict=True)
    ]


def test_nothing_above_the_threshold() -> None:
    assert run(PostprocessConfig(score_threshold=0.5), softmax_logits((0.1, 0.1), (0.2, 0.1), (0.3, 0.3))) == []


def test_the_defaults() -> None:
    config = PostprocessConfig()
    assert (config.score_threshold, config.nms_threshold) == (0.001, 0.55)
    assert (config.candidates, config.max_detections) == (1000, 300)


def test_groups_are_apart_from_corner_to_corner() -> None:
    reach = postprocess._REACH
    boxes = torch.tensor([[reach - 1, reach - 1, torch.inf, torch.inf], [-torch.inf, -torch.inf, 1 - reach, 1 - reach]])
    first, second = postprocess._apart(boxes, torch.tensor([0, 1]))
    assert (second[:2] > first[2:]).all()


def test_scores_of_a_batch_by_hand() -> None:
    # Two images with two anchors each: logits 0, ln 2 and ln 5 are to each other as 1, 2 and 5; the background is not scored.
    logits = torch.tensor([0.0, math.log(2), math.log(5)])
    batch = torch.stack((logits, logits[[1, 0, 2]], logits[[2, 1, 0]], logits)).view(2, 2, 3)
    expected = [[[0, 1 / 4, 5 / 8], [0, 1 / 8, 5 / 8]], [[0, 1 / 4, 1 / 8], [0, 1 / 4, 5 / 8]]]
    scores = Postprocess(PostprocessConfig(), SSDBoxCoder(), "softmax", True).scores(batch)
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_a_score_at_the_threshold_is_not_kept() -> None:
    # The sigmoid of 0 is 0.5 exactly. Only detections with a higher score are kept, whichever road finds them.
    raw = RawPredictions(torch.zeros(1, 2, 4), torch.tensor([[[0.0], [1.0]]]), ANCHORS[1:])
    for threshold, kept in ((0.5, 1), (0.49, 2)):
        post = Postprocess(PostprocessConfig(score_threshold=threshold), SSDBoxCoder(), "sigmoid", False)
        assert len(post(raw, WHOLE, SIZE)[0]) == kept
        assert int((post.batched(raw)[..., 4] > 0).sum()) == kept
    PostprocessConfig(score_threshold=0.0).validate()  # all of them


def test_suppression_is_within_a_class() -> None:
    # Anchors 0 and 1 overlap with IoU 90 / 110. As cats the second goes; as a dog it stays.
    logits = softmax_logits((0.8, 0.01), (0.6, 0.3), (0.02, 0.9))
    config = PostprocessConfig(score_threshold=0.05, nms_threshold=0.5)
    assert run(config, logits) == [([50, 50, 70, 90], 0.9, 1), ([0, 0, 10, 10], 0.8, 0), ([1, 0, 11, 10], 0.3, 1)]
    loose = PostprocessConfig(score_threshold=0.05, nms_threshold=0.9)
    assert ([1, 0, 11, 10], 0.6, 0) in run(loose, logits)


def test_a_threshold_of_one_suppresses_nothing() -> None:
    logits = softmax_logits((0.8, 0.01), (0.6, 0.3), (0.02, 0.9))
    anchors = ANCHORS[[0, 0, 2]]  # the same box twice
    config = PostprocessConfig(score_threshold=0.05, nms_threshold=1.0)
    cats = [(score, label) for _, score, label in run(config, logits, anchors)]
    assert cats == [(0.9, 1), (0.8, 0), (0.6, 0), (0.3, 1)]
    assert run(PostprocessConfig(score_threshold=0.05, nms_threshold=1.0, max_detections=1), logits) == [
        ([50, 50, 70, 90], 0.9, 1)
    ]


def test_limits() -> None:
    logits = softmax_logits((0.8, 0.01), (0.6, 0.3), (0.02, 0.9))
    assert run(PostprocessConfig(max_detections=1), logits) == [([50, 50, 70, 90], 0.9, 1)]
    assert [score for _, score, _ in run(PostprocessConfig(candidates=2), logits)] == [0.9, 0.8]
    assert [score for _, score, _ in run(PostprocessConfig(candidates=1), logits)] == [0.9]
    assert len(run(PostprocessConfig(candidates=10_000, nms_threshold=1.0), logits)) == 6  # more than there are pairs


def test_sigmoid_scores_with_and_without_a_background_column() -> None:
    logits = torch.tensor([[[9.0, 0.0, -9.0]]])  # columns: background?, cat, dog
    raw = RawPredictions(torch.zeros(1, 1, 4), logits, ANCHORS[:1])
    config = PostprocessConfig(score_threshold=0.01)
    (found,) = Postprocess(config, SSDBoxCoder(), "sigmoid", True)(raw, WHOLE, SIZE)
    assert found.scores.tolist() == [0.5]
    assert found.labels.tolist() == [0]
    (found,) = Postprocess(config, SSDBoxCoder(), "sigmoid", False)(raw, WHOLE, SIZE)
    assert found.labels.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.99988, 0.5], abs=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.25, 0.5, 0.999])
@pytest.mark.parametrize("background", [False, True])
def test_a_sigmoid_score_is_kept_where_it_is_higher_than_the_threshold(threshold: float, background: bool) -> None:
    edge = math.log(threshold / (1 - threshold)) if threshold else -20.0
    away = torch.tensor(
        [-0.1, -1e-4, 0, 1e-4, 0.1]
    )  # sigmoid rounds near the edge; a thousandth below is looked at too
    logits = torch.stack((torch.full((5,), 9.0), edge + away), -1)[None] if background else (edge + away)[None, :, None]
    anchors = torch.arange(5.0)[:, None] * 20 + torch.tensor([0.0, 0, 10, 10])
    (found,) = Postprocess(PostprocessConfig(score_threshold=threshold), SSDBoxCoder(), "sigmoid", background)(
        RawPredictions(torch.zeros(1, 5, 4), logits, anchors), WHOLE, SIZE
    )
    assert (found.scores > threshold).all()
    places = [int(x) // 20 for x in found.boxes[:, 0]]
    assert places[:2] == [4, 3]
    assert set(places[2:]) == ({0, 1, 2} if threshold == 0 else set(places[2:]) & {2})
    torch.testing.assert_close(found.scores, (edge + away[places]).sigmoid())


def test_boxes_come_back_to_the_image_by_hand() -> None:
    # An image 200 wide and 100 high, letterboxed into 320 x 320: scale 1.6, 80 pixels above it.
    # (80, 80)-(160, 240) in the input is (50, 0)-(100, 100) in the image; what sticks out is cut off by the whole road.
    anchors = torch.tensor([[80.0, 80, 160, 240], [-16, 0, 400, 400]])
    placements = torch.tensor([[1.6, 1.6, 0.0, 80.0]])
    assert to_image(anchors, placements[0]).tolist() == [[50, 0, 100, 100], [-10, -50, 250, 200]]
    raw = RawPredictions(torch.zeros(1, 2, 4), softmax_logits((0.8, 0.05), (0.7, 0.05)), anchors)
    (found,) = Postprocess(PostprocessConfig(score_threshold=0.1), SSDBoxCoder(), "softmax", True)(
        raw, placements, torch.tensor([[100, 200]])
    )
    assert found.boxes.tolist() == [[50, 0, 100, 100], [0, 0, 200, 100]]


def test_suppression_comes_before_clipping() -> None:
    # Inside the image both are the same 10 x 10; whole, they share 100 of 400 + 100.
    anchors = torch.tensor([[0.0, 0, 10, 10], [-10, -10, 10, 10]])
    found = run(
        PostprocessConfig(score_threshold=0.1, nms_threshold=0.5), softmax_logits((0.8, 0.05), (0.7, 0.05)), anchors
    )
    assert found == [([0, 0, 10, 10], 0.8, 0), ([0, 0, 10, 10], 0.7, 0)]


def test_a_box_outside_of_its_image_is_dropped() -> None:
    anchors = torch.tensor([[-30.0, 0, -10, 10]])
    assert run(PostprocessConfig(), softmax_logits((0.9, 0.05)), anchors) == []


def test_images_of_a_batch_do_not_meet() -> None:
    torch.manual_seed(0)
    raw = RawPredictions(torch.randn(3, 3, 4), torch.randn(3, 3, 3), ANCHORS)
    post = Postprocess(PostprocessConfig(), SSDBoxCoder(), "softmax", True)
    together = post(raw, WHOLE.expand(3, 4), SIZE.expand(3, 2))
    for b in range(3):
        (alone,) = post(RawPredictions(raw.codes[b : b + 1], raw.class_logits[b : b + 1], ANCHORS), WHOLE, SIZE)
        torch.testing.assert_close(together[b].boxes, alone.boxes)
        assert together[b].labels.tolist() == alone.labels.tolist()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PostprocessConfig(score_threshold=1.0), r"score_threshold must be in \[0, 1\), got 1.0"),
        (PostprocessConfig(nms_threshold=0.0), "nms_threshold must be in"),
        (PostprocessConfig(nms_threshold=1.01), r"nms_threshold must be in \(0, 1\], got 1.01"),
        (PostprocessConfig(score_threshold=-0.01), r"score_threshold must be in \[0, 1\), got -0.01"),
        (PostprocessConfig(candidates=0), "must be at least 1"),
        (PostprocessConfig(max_detections=0), "must be at least 1"),
    ],
)
def test_configs_that_make_no_sense(config: PostprocessConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Postprocess(config, SSDBoxCoder(), "softmax", True)


def test_suppression_looks_further_where_the_best_are_all_the_same_object() -> None:
    # Six boxes of one object, then one of another: the best few alone would give one.
    anchors = torch.cat((ANCHORS[:1].expand(6, 4), ANCHORS[2:]))
    logits = softmax_logits(*((0.9 - 0.01 * rank, 0.0001) for rank in range(6)), (0.5, 0.0001))
    found = run(PostprocessConfig(max_detections=2), logits, anchors)
    assert found == [([0, 0, 10, 10], 0.9, 0), ([50, 50, 70, 90], 0.5, 0)]


def test_images_of_a_batch_with_different_numbers_of_candidates_do_not_meet() -> None:
    busy, quiet = (
        softmax_logits((0.8, 0.1), (0.6, 0.3), (0.02, 0.9)),
        softmax_logits((0.1, 0.1), (0.1, 0.1), (0.7, 0.1)),
    )
    raw = RawPredictions(torch.zeros(3, 3, 4), torch.cat((quiet, torch.full((1, 3, 3), 9.0), busy)), ANCHORS)
    found = Postprocess(PostprocessConfig(score_threshold=0.5), SSDBoxCoder(), "softmax", True)(
        raw, WHOLE.expand(3, 4), SIZE.expand(3, 2)
    )
    assert [[round(score, 4) for score in one.scores.tolist()] for one in found] == [[0.7], [], [0.9, 0.8]]


def drawn(B: int, A: int = 200, C: int = 5) -> RawPredictions:
    torch.manual_seed(B)
    corners = 80 * torch.rand(A, 2)
    anchors = torch.cat((corners, corners + 5 + 30 * torch.rand(A, 2)), 1)
    return RawPredictions(torch.randn(B, A, 4), 3 * torch.randn(B, A, C), anchors)


@pytest.mark.parametrize("at_once", [1, 500, 10_000])
@pytest.mark.parametrize("nms_threshold", [0.55, 1.0])
@pytest.mark.parametrize(("limit", "background"), [(300, True), (7, False)])
def test_the_road_of_a_gpu_finds_the_same(
    monkeypatch: pytest.MonkeyPatch, at_once: int, limit: int, background: bool, nms_threshold: float
) -> None:
    monkeypatch.setattr(postprocess, "_AT_ONCE", at_once)
    config = PostprocessConfig(score_threshold=0.3, nms_threshold=nms_threshold, candidates=250, max_detections=limit)
    post = Postprocess(config, SSDBoxCoder(), "sigmoid", background)
    raw = drawn(5)
    raw.class_logits[1] = -9.0  # nothing in one image, less than the limit in another
    raw.class_logits[2, 3:] = -9.0
    raw.class_logits[3, 0] = float("nan")
    one_by_one = list(post._each(raw))
    packed = post.batched(raw)
    assert packed.shape == (5, min(limit, 250), 6)
    assert len(one_by_one[1][1]) == 0 < len(one_by_one[2][1]) <= limit
    for alone, together in zip(one_by_one, postprocess._unpack(packed), strict=True):
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


class CountOperators(TorchDispatchMode):
    """Counts the operators for whose result the host has to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        waits = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if func.name() == "aten::index.Tensor":  # its shape depends on the values of masks alone
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        to_host = (
            isinstance(out, Tensor)
            and out.device.type == "cpu"
            and any(isinstance(arg, Tensor) and arg.device.type == "cuda" for arg in args)
        )
        if waits or to_host or func.name() == "torchvision::nms":
            self.waits.append(func.name())
        return out


@needs_indexing
@pytest.mark.filterwarnings("ignore:`create_unbacked_symint`:FutureWarning")  # torchvision's
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_host_waits_do_not_grow_with_the_batch(batch_size: int) -> None:
    # On fake CUDA tensors: no GPU is needed, and no value can be read on the host.
    post = Postprocess(PostprocessConfig(), SSDBoxCoder(), "softmax", True)
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=False), CountOperators() as count:
        raw = RawPredictions(
            torch.randn(batch_size, 2034, 4, device="cuda"),
            torch.randn(batch_size, 2034, 81, device="cuda"),
            torch.rand(2034, 4, device="cuda"),
        )
        on_host = post.batched(raw).cpu()
    assert on_host.shape == (batch_size, 300, 6)
    assert count.waits == ["torchvision::nms", "aten::_to_copy"]
