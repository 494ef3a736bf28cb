import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import needs_indexing
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.classifier import Classifier, ClassifierConfig
from backbones.layers import Normalise
from backbones.mobilenetv2 import MobileNetV2Config
from detection.classification.accuracy import Accuracy, count_correct, measure_accuracy
from detection.classification.config import TransformConfig
from detection.classification.data import (
    ClassificationBatch,
    ClassificationDataset,
    ClassifiedImage,
    EvalTransform,
    TrainTransform,
    UnreadableImageError,
    collate,
    read_image_folder,
)
from detection.classification.step import ClassificationStep
from detection.images.decode import read_image

CPU = torch.device("cpu")


def write_image(path: Path, color: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (40, 60)) -> None:
    """A PNG of one RGB colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full((*size, 3), color, np.uint8)
    assert cv2.imwrite(str(path), image[:, :, ::-1])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Classes cat (3 images, one a folder deeper) and dog (2), with things that are no images among them."""
    root = tmp_path / "images"
    for number, name in enumerate(["cat/b.png", "cat/a.png", "cat/more/c.PNG", "dog/ä.png", "dog/z.png"]):
        write_image(root / name, (number, 50, 200))
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "README").write_text("no class")
    return root


def test_folder(root: Path) -> None:
    folder = read_image_folder(root)
    assert folder.class_names == ("cat", "dog")
    assert [str(folder.path(i).relative_to(root)) for i in range(len(folder))] == [
        "cat/a.png", "cat/b.png", "cat/more/c.PNG", "dog/z.png", "dog/ä.png",
    ]  # fmt: skip
    assert folder.labels.tolist() == [0, 0, 0, 1, 1]
    assert len(read_image_folder(root, ("cat", "dog"))) == 5


def test_folder_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image folder .*nowhere does not exist"):
        read_image_folder(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"image folder .*empty has no class folders; images are expected as .*CLASS"):
        read_image_folder(tmp_path / "empty")
    with pytest.raises(ValueError, match=r"has other classes .*; missing: owl; not in the training data: dog"):
        read_image_folder(root, ("cat", "owl"))
    (root / "bird").mkdir()
    (root / "bird" / "readme.md").write_text("later")
    with pytest.raises(ValueError, match=r"class folder .*bird has no image \(.*\.jpg.*\); add some or remove it"):
        read_image_folder(root)


def test_read_image(root: Path, tmp_path: Path) -> None:
    image = read_image(root / "cat" / "b.png")
    assert image.shape == (40, 60, 3)
    assert image[0, 0].tolist() == [0, 50, 200], "red first"
    cv2.imwrite(str(tmp_path / "grey.png"), np.full((4, 5), 7, np.uint8))
    assert read_image(tmp_path / "grey.png").shape == (4, 5, 3)
    for content in (b"", b"not an image", (root / "cat" / "b.png").read_bytes()[:40]):
        (tmp_path / "rotten.jpg").write_bytes(content)
        with pytest.raises(
            UnreadableImageError, match=rf"rotten.jpg: the image does not decode \({len(content)} bytes\)"
        ):
            read_image(tmp_path / "rotten.jpg")
    with pytest.raises(UnreadableImageError, match=r"gone.jpg: No such file"):
        read_image(tmp_path / "gone.jpg")


def test_center_crop_and_squash_by_hand() -> None:
    # 64 x 128; columns 0..31 are 0, 32..95 are 100, 96..127 are 200. The middle square is all 100.
    image = np.zeros((64, 128, 3), np.uint8)
    image[:, 32:96], image[:, 96:] = 100, 200
    whole_middle = TransformConfig(eval_size=32, eval_crop_share=1.0)
    assert np.unique(EvalTransform(whole_middle)(image, 0, 0)).tolist() == [100]
    squashed = EvalTransform(TransformConfig(eval_size=32, eval_resize="squash"))(image, 0, 0)
    assert squashed.shape == (32, 32, 3)
    assert squashed[16, [0, 6, 9, 22, 25, 31], 0].tolist() == [0, 0, 100, 100, 200, 200]
    # a share of 1/2: rows and columns 16..47 of 64
    marked = np.zeros((64, 64, 3), np.uint8)
    marked[16:48, 16:48] = 255
    assert EvalTransform(TransformConfig(eval_size=32, eval_crop_share=0.5))(marked, 0, 0).min() == 255


def test_training_transform_depends_on_seed_epoch_and_position_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3)).astype(np.uint8)
    config = TransformConfig(size=32, color_jitter=0.4, trivial_augment=True, random_erasing=0.5)
    transform = TrainTransform(config, seed=1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = transform(image, 2, 3)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left as it was"
    assert first.shape == (32, 32, 3)
    assert first.dtype == np.uint8
    torch.manual_seed(99)
    assert np.array_equal(transform(image, 2, 3), first)
    assert np.array_equal(TrainTransform(config, seed=1)(image, 2, 3), first)
    for other in (transform(image, 3, 3), transform(image, 2, 4), TrainTransform(config, seed=2)(image, 2, 3)):
        assert not np.array_equal(other, first)


def test_flip_and_whole_crop() -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = 200
    config = TransformConfig(size=32, min_scale=1.0, max_aspect=1.0, flip=1.0)
    assert np.array_equal(TrainTransform(config)(image, 0, 0), image[:, ::-1])


def test_one_rotten_image_is_replaced_in_training_and_left_out_in_evaluation(root: Path) -> None:
    (root / "cat" / "a.png").write_bytes(b"rotten")
    folder = read_image_folder(root)
    config = TransformConfig(size=32, eval_size=32)
    training = ClassificationDataset(folder, TrainTransform(config))
    sample = training[5, 0]
    assert sample.image is not None
    assert len(sample.skipped) == 1
    assert "cat/a.png: the image does not decode (6 bytes)" in sample.skipped[0]
    again = training[5, 0]
    assert again.label == sample.label
    assert np.array_equal(again.image, sample.image)
    batch = collate([training[0, position] for position in range(5)])
    assert len(batch) == 5
    assert len(batch.skipped) == 1

    evaluation = ClassificationDataset(folder, EvalTransform(config))
    batch = collate([evaluation[0, position] for position in range(5)])
    assert len(batch) == 4
    assert batch.labels.tolist() == [0, 0, 1, 1]
    assert len(batch.skipped) == 1


def test_only_rotten_images(root: Path) -> None:
    folder = read_image_folder(root)
    for position in range(5):
        folder.path(position).write_bytes(b"x")
    config = TransformConfig(size=32, eval_size=32)
    with pytest.raises(UnreadableImageError, match=r"21 images in a row cannot be read; the first: .*a.png"):
        ClassificationDataset(folder, TrainTransform(config))[0, 0]
    evaluation = ClassificationDataset(folder, EvalTransform(config))
    batch = collate([evaluation[0, position] for position in range(5)])
    assert len(batch) == 0
    accuracy = measure_accuracy(nn.Identity(), [batch], Normalise(), CPU)
    with pytest.raises(ValueError, match=r"no image of the evaluation can be read: .*a.png"):
        accuracy.scalars()


def test_batch() -> None:
    assert len(collate([])) == 0
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    batch = collate([ClassifiedImage(image, 4), ClassifiedImage(image + 1, 2, ("x.jpg: rotten",))])
    assert batch.images.shape == (2, 3, 2, 4)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.images[1, 2, 1, 3] == image[1, 3, 2] + 1
    images, labels = batch.to(CPU).inputs()
    assert images.dtype == torch.uint8
    assert labels.tolist() == [4, 2]
    assert batch.skipped == ["x.jpg: rotten"]


def test_normalise_by_hand() -> None:
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).reshape(1, 3, 1, 1)
    # 0 / 255 = 0, 255 / 255 = 1, 51 / 255 = 0.2
    values = Normalise((0.5, 0.5, 0.1), (0.5, 0.25, 1.0))(images).flatten().tolist()
    assert values == pytest.approx([-1.0, 2.0, 0.1])


def test_step_is_cross_entropy_of_normalised_images() -> None:
    torch.manual_seed(0)
    model = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35)), 3).eval()
    nn.init.normal_(model.linear.weight)  # logits far enough apart for the smoothing to count
    normalise = Normalise()
    step = ClassificationStep(model, normalise, label_smoothing=0.3)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    labels = torch.tensor([0, 2, 1, 2])
    logits = model(normalise(images))
    # 0.3 of the target is shared by 3 classes: 0.8 for the label, 0.1 for each other
    target = torch.full((4, 3), 0.1).scatter_(1, labels[:, None], 0.8)
    expected = -(target * F.log_softmax(logits, 1)).sum(1).mean()
    torch.testing.assert_close(step(images, labels), {"loss": expected})


def test_step_compiles_whole() -> None:
    backbone = MobileNetV2Config(width=0.35, settings=((1, 16, 1, 1), (6, 24, 2, 2)))
    model = Classifier(ClassifierConfig(backbone=backbone), 3).eval()
    step = ClassificationStep(model, Normalise(), label_smoothing=0.1)
    images, labels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 2])
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, labels), step(images, labels))


@needs_indexing
def test_step_never_waits_for_the_device() -> None:
    """A fake CUDA device has no values: whatever asks for one raises, and so does a tensor left on the CPU."""
    with FakeTensorMode(), torch.device("cuda"):
        model = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35, padding="tf_same")), 3)
        step = ClassificationStep(model, Normalise(), label_smoothing=0.1)
        images = torch.empty(2, 3, 33, 32, dtype=torch.uint8)
        labels = torch.zeros(2, dtype=torch.int64)
        loss = step(images, labels)["loss"]
        assert loss.device.type == "cuda"
        assert count_correct(model(step.normalise(images)), labels).device.type == "cuda"


def test_count_correct_by_hand() -> None:
    logits = torch.tensor(
        [
            [9.0, 1, 2, 3, 4, 5, 6],  # label 0: first
            [9.0, 1, 2, 3, 4, 5, 6],  # label 3: 9, 6, 5, 4 are above, so fifth
            [9.0, 1, 2, 3, 4, 5, 6],  # label 2: sixth
            [1.0, 1, 1, 1, 1, 1, 1],  # ties count against: seventh
        ]
    )
    labels = torch.tensor([0, 3, 2, 0])
    assert count_correct(logits, labels).tolist() == [1, 2]
    assert count_correct(logits, labels, top=(6, 7)).tolist() == [3, 4]
    assert count_correct(torch.tensor([[1.0, 2.0]]), torch.tensor([0])).tolist() == [0, 1], "k above K"
    assert count_correct(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).tolist() == [0, 0]
    assert count_correct(torch.tensor([[float("nan"), 1.0]]), torch.tensor([1]), top=(1,)).tolist() == [0]


def test_accuracy_over_batches() -> None:
    class MeanColor(nn.Module):
        """Logit k is the mean of channel k."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    def batch(*colors: tuple[int, int, int], labels: list[int]) -> ClassificationBatch:
        return collate(
            [ClassifiedImage(np.full((2, 2, 3), c, np.uint8), label) for c, label in zip(colors, labels, strict=True)]
        )

    batches = [
        batch((200, 0, 0), (0, 200, 0), labels=[0, 0]),
        batch((0, 0, 200), labels=[2]),
        collate([ClassifiedImage(None, 1, ("a.jpg: rotten",))]),
    ]
    accuracy = measure_accuracy(MeanColor(), batches, Normalise((0, 0, 0), (1, 1, 1)), CPU)
    assert accuracy.counts.tolist() == [2, 3, 3]
    assert accuracy.scalars() == {"top1": pytest.approx(2 / 3), "top5": 1.0}
    assert accuracy.skipped == ["a.jpg: rotten"]
    assert Accuracy(counts=torch.tensor([1, 2, 4]), skipped=[]).scalars() == {"top1": 0.25, "top5": 0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 16}, r"transform.size is 16; at least 32"),
        ({"eval_size": 0}, r"transform.eval_size is 0"),
        ({"min_scale": 0.0}, r"transform.min_scale is 0.0; it is above 0"),
        ({"eval_crop_share": 1.5}, r"transform.eval_crop_share is 1.5"),
        ({"flip": 2.0}, r"transform.flip is 2.0"),
        ({"max_aspect": 0.5}, r"transform.max_aspect is 0.5"),
        ({"eval_resize": "pad"}, r"transform.eval_resize is 'pad'"),
    ],
)
def test_transform_config_refuses(change: dict, message: str) -> None:
    TransformConfig().validate()
    with pytest.raises(ValueError, match=message):
        TransformConfig(**change).validate()


def test_image_that_went_away(root: Path) -> None:
    folder = read_image_folder(root)
    shutil.rmtree(root / "dog")
    sample = ClassificationDataset(folder, EvalTransform(TransformConfig()))[0, 4]
    assert sample.image is None
    assert "ä.png: No such file" in sample.skipped[0]
