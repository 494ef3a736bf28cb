"""A detector in three lines, and detectors on disk. Run: pytest tests/test_predictor.py"""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

import detection
from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.weights.info import WeightsInfo
from backbones.weights.native import save_weights
from detection import load_detector
from detection.engine.checkpoint import save_checkpoint
from detection.engine.plain import to_plain
from detection.inference.inputs import Image, to_array
from detection.inference.predictor import Predictor, read_image
from detection.inference.runners import Backend, build_runner
from detection.models.anchors import AnchorConfig
from detection.models.folding import fold_norms
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.structures import RawPredictions
from detection.weights.info import DetectorInfo
from detection.weights.native import DetectorFile, read_detector, read_file, save_detector
from detection.weights.start import start_from

SMALL = MobileNetV2Config(width=0.35)
NAMES = ("cat", "dog")


def small_config(**changes: object) -> SSDLiteConfig:
    return SSDLiteConfig(backbone=SMALL, input_size=(96, 128), **changes)  # type: ignore[arg-type]


def small_detector(names: tuple[str, ...] = NAMES, seed: int = 0, **changes: object) -> tuple[SSDLite, DetectorInfo]:
    torch.manual_seed(seed)
    model = SSDLite(small_config(**changes), len(names)).eval()
    for module in model.modules():  # statistics as after a training, so that folding has something to do
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    info = DetectorInfo(
        model=model.config,
        postprocess=PostprocessConfig(),
        class_names=names,
        category_ids=tuple(range(1, len(names) + 1)),
    )
    return model, info


def small_predictor(backend: Backend = "torch") -> Predictor:
    model, info = small_detector()
    return Predictor(build_runner(model, backend), info)


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)


def test_three_lines(tmp_path: Path, image: np.ndarray) -> None:
    save_detector(tmp_path / "d.safetensors", *small_detector())
    detector = load_detector(tmp_path / "d.safetensors", device="cpu", score_threshold=0.01)
    found = detector(image)
    assert len(found) > 0
    assert detector.class_names == NAMES
    assert set(found.names()) <= set(NAMES)
    assert found.boxes.min() >= 0
    assert found.boxes[:, 2].max() <= 200
    assert found.boxes[:, 3].max() <= 150
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert len(found.above(1.0)) == 0


def test_an_array_a_path_and_a_batch_are_the_same(tmp_path: Path, image: np.ndarray) -> None:
    detector = small_predictor()
    path = tmp_path / "bild ü.png"
    assert cv2.imencode(".png", image[..., ::-1])[1].tofile(path) is None
    alone = detector(image)
    batch = detector([str(path), image, image[:100]])
    for found in (detector(path), *batch[:2]):
        torch.testing.assert_close(found.boxes, alone.boxes, rtol=1e-3, atol=0.05)
    assert batch[2].boxes[:, 3].max() <= 100
    assert detector([]) == []


def test_folding_changes_nothing_but_the_layers() -> None:
    model, _ = small_detector()
    images = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
    with torch.inference_mode():
        before = model(images)
        after = fold_norms(model)(images)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(after.class_logits, before.class_logits, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.codes, before.codes, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "checkpoint"])
def test_a_detector_on_disk_is_the_same_detector(tmp_path: Path, kind: str) -> None:
    model, info = small_detector()
    path = tmp_path / ("d.safetensors" if kind == "safetensors" else "best.pt")
    if kind == "safetensors":
        save_detector(path, model, info)
    else:
        save_checkpoint(path, {"weights": model.state_dict(), "extra": {"detector": to_plain(info)}})
    assert isinstance(read_file(path), DetectorFile)
    again, info_again = read_detector(path)
    assert info_again == info
    images = torch.randint(0, 256, (1, 3, 96, 128), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(again(images).class_logits, model(images).class_logits)
    larger, _ = read_detector(path, input_size=(160, 160))
    assert len(larger.anchors) > len(model.anchors)


def test_start_from_a_detector_of_other_classes_keeps_all_but_the_classes(tmp_path: Path) -> None:
    old, info = small_detector(seed=1)
    save_detector(tmp_path / "d.safetensors", old, info)
    new, _ = small_detector(("bird", "cat", "dog"), seed=2)
    fresh = {key: value.clone() for key, value in new.state_dict().items()}
    said = start_from(new, tmp_path / "d.safetensors", ("bird", "cat", "dog"))
    assert "knows 2 classes (cat, dog) and is to learn 3 (bird, cat, dog)" in said
    state, old_state = new.state_dict(), old.state_dict()
    outputs = {f"head.classes.{k}.1.{name}" for k in range(6) for name in ("weight", "bias")}
    for key, value in state.items():
        assert torch.equal(value, fresh[key] if key in outputs else old_state[key]), key


def test_start_from_the_same_classes_loads_all(tmp_path: Path) -> None:
    old, info = small_detector(seed=1)
    save_detector(tmp_path / "d.safetensors", old, info)
    new, _ = small_detector(seed=2)
    assert "new" not in start_from(new, tmp_path / "d.safetensors", NAMES)
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), old.state_dict().values(), strict=True))


def test_start_from_a_classifier_takes_backbone_and_normalisation(tmp_path: Path) -> None:
    torch.manual_seed(3)
    classifier = Classifier(ClassifierConfig(backbone=SMALL), 5)
    half = (0.5, 0.5, 0.5)
    save_weights(tmp_path / "c.safetensors", classifier, WeightsInfo(mean=half, std=half))
    model, _ = small_detector(mean=None, std=None)
    model.config.mean = model.config.std = None
    assert "heads are new" in start_from(model, tmp_path / "c.safetensors", NAMES)
    assert torch.equal(model.backbone.stem.conv.weight, classifier.backbone.stem.conv.weight)
    assert model.normalise.mean.flatten().tolist() == pytest.approx([127.5] * 3)
    assert model.config.std == half
    assert model.config.fill == (128, 128, 128)


def test_a_detector_of_another_build_is_refused(tmp_path: Path) -> None:
    save_detector(tmp_path / "d.safetensors", *small_detector())
    model, _ = small_detector(anchors=AnchorConfig(min_scale=0.1))
    with pytest.raises(ValueError, match=r"made with another network[\s\S]*anchors: the weights have .*min_scale=0.2"):
        start_from(model, tmp_path / "d.safetensors", NAMES)


def test_files_that_hold_no_detector(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pt does not exist"):
        load_detector(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.pt is not a weights file that can be read"):
        load_detector(tmp_path / "text.pt")
    save_weights(tmp_path / "c.safetensors", Classifier(ClassifierConfig(backbone=SMALL), 5), WeightsInfo())
    with pytest.raises(ValueError, match=r"c\.safetensors holds no detector"):
        load_detector(tmp_path / "c.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ValueError, match=r"broken\.safetensors is not a safetensors file"):
        load_detector(tmp_path / "broken.safetensors")
    save_checkpoint(tmp_path / "other.pt", {"weights": {}, "extra": {}})
    with pytest.raises(ValueError, match="a checkpoint, but not of a detector or classifier"):
        load_detector(tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"written as \.safetensors"):
        save_detector(tmp_path / "d.pt", *small_detector())


def test_cuda_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    save_detector(tmp_path / "d.safetensors", *small_detector())
    with pytest.raises(ValueError, match="'cuda' was asked for"):
        load_detector(tmp_path / "d.safetensors", device="cuda")


def test_images_that_are_none(tmp_path: Path, image: np.ndarray) -> None:
    detector = small_predictor()
    with pytest.raises(FileNotFoundError, match=r"gone\.jpg: No such file"):
        detector(tmp_path / "gone.jpg")
    for content in (b"", b"no image"):
        (tmp_path / "bad.jpg").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.jpg: the image does not decode"):
            read_image(tmp_path / "bad.jpg")
    with pytest.raises(ValueError, match=r"got float32 \(150, 200, 3\)"):
        detector(image.astype(np.float32))
    with pytest.raises(ValueError, match=r"got uint8 \(150, 200\); a grey one"):
        detector(image[..., 0])


def test_all_forms_of_an_image_are_the_same_image(tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "image.png"
    PILImage.fromarray(image).save(path)
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    forms: list[Image] = [path, str(path), PILImage.fromarray(image), PILImage.open(path), tensor, tensor.float() / 255]
    for form in forms:
        assert np.array_equal(to_array(form), image)
    assert np.array_equal(to_array(tensor.double() / 255), image)
    detector = small_predictor()
    alone = detector(PILImage.fromarray(image))
    for found in detector((image, *forms)):
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-5)


def test_pil_images_are_turned_as_their_files_are(tmp_path: Path, image: np.ndarray) -> None:
    for orientation in range(1, 9):
        path = tmp_path / f"{orientation}.png"
        exif = PILImage.Exif()
        exif[0x0112] = orientation
        PILImage.fromarray(image).save(path, exif=exif)
        assert np.array_equal(to_array(PILImage.open(path)), to_array(path)), orientation


def test_pil_images_of_other_modes(image: np.ndarray) -> None:
    picture = PILImage.fromarray(image)
    for mode in ("L", "1", "P", "RGBA", "LA", "CMYK"):
        assert to_array(picture.convert(mode)).shape == image.shape
    for mode in ("I", "F", "I;16"):
        with pytest.raises(UserError, match=f"mode {mode} has more than 8 bits"):
            to_array(picture.convert("L").convert(mode))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "got None"),
        (3, "got a int"),
        (b"bytes", "got a bytes"),
        ([[1, 2], [3, 4]], "got a list"),
        (torch.zeros(4, 5, 3), r"shape \(3, height, width\), got \(4, 5, 3\); permute"),
        (torch.zeros(1, 3, 4, 5), r"a batch is given as list\(images\)"),
        (torch.zeros(3, 4, 5, dtype=torch.int64), "got torch.int64"),
        (torch.full((3, 4, 5), 255.0), "in 0..1, got 255 to 255"),
        (torch.full((3, 4, 5), float("nan")), "in 0..1, got nan"),
        (np.zeros((4, 5, 3)), r"got float64 \(4, 5, 3\); one in 0..1 becomes uint8"),
        (np.zeros((4, 5, 4), np.uint8), r"got uint8 \(4, 5, 4\)$"),
    ],
)
def test_what_is_no_image_gets_one_line(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        small_predictor()([given])  # type: ignore[list-item]
    assert "\n" not in str(caught.value)


def test_one_number_for_the_input_size(tmp_path: Path, image: np.ndarray) -> None:
    save_detector(tmp_path / "d.safetensors", *small_detector())
    detector = load_detector(tmp_path / "d.safetensors", device="cpu", input_size=128)
    assert detector.info.model.input_size == (128, 128)
    detector(image)
    for wrong in ((96,), "320", (96.0, 96.0), True, -3):
        with pytest.raises(UserError, match="input_size is"):
            load_detector(tmp_path / "d.safetensors", device="cpu", input_size=wrong)  # type: ignore[arg-type]


def test_a_function_is_a_runner(image: np.ndarray) -> None:
    model, info = small_detector()
    plain = model.eval()
    asked: list[torch.Size] = []

    def run(images: torch.Tensor) -> RawPredictions:
        assert images.dtype == torch.uint8
        asked.append(images.shape)
        raw: RawPredictions = plain(images)
        return raw

    found = Predictor(run, info)(image)
    torch.testing.assert_close(found.scores, small_predictor()(image).scores, rtol=1e-3, atol=1e-4)
    assert asked == [(1, 3, 96, 128)]


def test_the_names_of_the_package() -> None:
    for name in detection.__all__:
        assert getattr(detection, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'Detector'"):
        _ = detection.Detector
