import json
import urllib.error
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from shared_data import SHARED, needs_shared
from torch import nn

from backbones.classifier import Classifier, ClassifierConfig
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD, Normalise
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.foreign import to_torchvision
from backbones.weights.info import WeightsInfo
from backbones.weights.layouts import torchvision_keys
from backbones.weights.native import load_backbone, load_classifier, save_weights
from backbones.weights.readers import read_metadata
from detection.classification.accuracy import count_correct
from detection.classification.config import TransformConfig
from detection.classification.data import EvalTransform
from detection.images.decode import read_image

SMALL = MobileNetV2Config(width=0.35)


def small_classifier(num_classes: int = 3, backbone: MobileNetV2Config = SMALL) -> Classifier:
    return Classifier(ClassifierConfig(backbone=backbone), num_classes)


def equal(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "theirs.pth"
    torch.save(torchvision.models.mobilenet_v2(width_mult=0.35, num_classes=3).state_dict(), path)
    return path


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_key_table_is_complete_both_ways(width: float) -> None:
    classifier = small_classifier(backbone=MobileNetV2Config(width=width))
    network = torchvision.models.mobilenet_v2(width_mult=width, num_classes=3)
    table = torchvision_keys(classifier.backbone.config)
    assert list(table) == list(classifier.state_dict())
    assert set(table.values()) == set(network.state_dict())
    assert len(set(table.values())) == len(table) == 314
    network.load_state_dict(to_torchvision(classifier), strict=True)
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), classifier.eval()(images), rtol=1e-5, atol=1e-6)


def test_what_torchvision_has_not_cannot_go_there() -> None:
    with pytest.raises(ValueError, match=r"set residual='identity' padding='symmetric'"):
        to_torchvision(small_classifier(backbone=MobileNetV2Config(residual="projection", padding="tf_same")))


def test_ours_goes_round(tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = MobileNetV2Config(width=0.35, padding="tf_same", residual="projection", norm_eps=1e-3)
    first = small_classifier(3, backbone).to(memory_format=torch.channels_last)
    first.backbone.stem.norm.running_mean += 2
    info = WeightsInfo(
        mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0), class_names=("a", "ö", "c"), source="drawn", licence="CC0-1.0"
    )
    path = tmp_path / "new_folder" / "backbone.safetensors"
    save_weights(path, first, info)
    assert [file.name for file in path.parent.iterdir()] == ["backbone.safetensors"], "no temporary file is left"
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable to whom any new file is"

    second = small_classifier(3, backbone)
    got, remark = load_classifier(second, path, ("a", "ö", "c"))
    assert equal(first, second)
    assert remark == ""
    assert (got.mean, got.std, got.class_names) == (info.mean, info.std, info.class_names)
    assert (got.source, got.licence, got.padding, got.layout) == ("drawn", "CC0-1.0", "tf_same", "litedet")
    metadata = read_metadata(path)
    assert json.loads(metadata["backbone"])["residual"] == "projection"
    assert metadata["padding"] == "tf_same"

    alone = MobileNetV2(backbone, ("stride16_expansion", "last"))
    load_backbone(alone, path)
    assert equal(alone, first.backbone), "a classifier's file is a backbone's file"
    save_weights(tmp_path / "alone.safetensors", alone, info)
    again = small_classifier(3, backbone)
    _, remark = load_classifier(again, tmp_path / "alone.safetensors")
    assert equal(again.backbone, alone)
    assert "alone.safetensors has no classifier: the linear layer for 3 classes is new" in remark


def test_freezing_and_momentum_may_differ_from_the_file(tmp_path: Path) -> None:
    classifier = small_classifier()
    save_weights(tmp_path / "a.safetensors", classifier, WeightsInfo())
    config = MobileNetV2Config(width=0.35, frozen_stages=2, freeze_norm=True, norm_momentum=0.03)
    backbone = MobileNetV2(config)
    load_backbone(backbone, tmp_path / "a.safetensors")
    assert equal(backbone, classifier.backbone)


def test_torchvisions_file(theirs: Path) -> None:
    classifier = small_classifier()
    info, remark = load_classifier(classifier, theirs)
    backbone = MobileNetV2(SMALL)
    assert load_backbone(backbone, str(theirs)) == info
    assert equal(backbone, classifier.backbone)
    state = torch.load(theirs, weights_only=True)
    assert torch.equal(classifier.linear.weight, state["classifier.1.weight"])
    assert torch.equal(backbone.stage2[1].project.conv.weight, state["features.3.conv.2.weight"])
    assert (info.mean, info.std, info.padding, info.layout) == (IMAGENET_MEAN, IMAGENET_STD, "symmetric", "torchvision")
    assert remark == ""


def test_file_of_an_old_torch_without_counters(theirs: Path, tmp_path: Path) -> None:
    state = torch.load(theirs, weights_only=True)
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "old.pth")
    backbone = MobileNetV2(SMALL)
    load_backbone(backbone, tmp_path / "old.pth")
    assert backbone.stem.norm.num_batches_tracked == 0


def test_other_class_count_makes_the_linear_layer_new(theirs: Path) -> None:
    classifier = small_classifier(7)
    before = classifier.linear.weight.clone()
    _, remark = load_classifier(classifier, theirs)
    assert remark.endswith("theirs.pth has 3 classes: the linear layer for 7 classes is new")
    assert torch.equal(classifier.linear.weight, before)
    same = small_classifier()
    load_classifier(same, theirs)
    assert equal(same.backbone, classifier.backbone)


def test_other_classes_of_the_same_count_make_it_new(tmp_path: Path) -> None:
    first = small_classifier()
    save_weights(tmp_path / "a.safetensors", first, WeightsInfo(class_names=("cat", "dog", "owl")))
    second = small_classifier()
    _, remark = load_classifier(second, tmp_path / "a.safetensors", ("cat", "fox", "owl"))
    assert "has other classes ('dog' where the data has 'fox'): the linear layer is new" in remark
    assert not torch.equal(second.linear.weight, first.linear.weight)
    assert equal(second.backbone, first.backbone)


def test_every_mismatch_is_named_and_nothing_is_loaded(theirs: Path, tmp_path: Path) -> None:
    state = torch.load(theirs, weights_only=True)
    del state["features.18.1.bias"]
    state["features.19.weight"] = torch.zeros(4, 2)
    state["features.1.conv.1.weight"] = torch.zeros(8, 16, 3, 3)
    torch.save(state, tmp_path / "broken.pth")
    backbone, before = MobileNetV2(SMALL), MobileNetV2(SMALL)
    before.load_state_dict(backbone.state_dict())
    with pytest.raises(ValueError, match=r"broken.pth does not fit the network, nothing was loaded") as caught:
        load_backbone(backbone, tmp_path / "broken.pth")
    lines = str(caught.value).splitlines()[1:]
    assert lines == [
        "  missing: last.norm.bias [1280]",
        "  not expected: features.19.weight [4, 2]",
        "  stage1.0.project.conv.weight: expected shape [8, 16, 1, 1], given [8, 16, 3, 3]",
    ]
    assert equal(backbone, before)


def test_another_width_is_told(theirs: Path) -> None:
    message = r"nothing was loaded \(\d+ of \d+ tensors differ\); these are the shapes of width=0.35, the config has width=1.0"
    with pytest.raises(ValueError, match=message):
        load_backbone(MobileNetV2(MobileNetV2Config()), theirs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MobileNetV2Config(width=0.35, padding="tf_same"), r"set padding='symmetric'\n.*the config 'tf_same'"),
        (MobileNetV2Config(width=0.35, residual="projection"), r"set residual='identity'"),
        (MobileNetV2Config(width=0.35, norm_eps=1e-3), r"set norm_eps=1e-05"),
    ],
)
def test_what_no_shape_shows_is_checked(theirs: Path, tmp_path: Path, config: MobileNetV2Config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(MobileNetV2(config), theirs)
    save_weights(tmp_path / "ours.safetensors", small_classifier(), WeightsInfo())
    with pytest.raises(ValueError, match=message):
        load_backbone(MobileNetV2(config), tmp_path / "ours.safetensors")


def test_width_of_our_file_is_told(tmp_path: Path) -> None:
    save_weights(tmp_path / "ours.safetensors", small_classifier(), WeightsInfo())
    with pytest.raises(ValueError, match=r"set width=0.35\n  width: the weights have 0.35, the config 0.5"):
        load_backbone(MobileNetV2(MobileNetV2Config(width=0.5)), tmp_path / "ours.safetensors")


def test_missing_file(tmp_path: Path) -> None:
    for name in ("no.pt", "no.safetensors"):
        with pytest.raises(FileNotFoundError, match=rf"{name} does not exist; a weights file was expected"):
            load_backbone(MobileNetV2(SMALL), tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"is a folder, not a weights file"):
        load_backbone(MobileNetV2(SMALL), tmp_path)


@pytest.mark.parametrize(
    "content", [b"hello, I am a text\n", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(64)]
)
def test_not_a_weights_file(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name} is not a (weights|safetensors) file"):
            load_backbone(MobileNetV2(SMALL), tmp_path / name)


def test_file_of_another_kind(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"run.pt holds a dict with the keys model, epoch, not a state dict"):
        load_backbone(MobileNetV2(SMALL), tmp_path / "run.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list.pt holds no dict"):
        load_backbone(MobileNetV2(SMALL), tmp_path / "list.pt")
    torch.save({"conv1.weight": torch.zeros(1), "bn1.weight": torch.zeros(1)}, tmp_path / "resnet.pt")
    with pytest.raises(ValueError, match=r"its first keys are conv1.weight, bn1.weight; read are torchvision's"):
        load_backbone(MobileNetV2(SMALL), tmp_path / "resnet.pt")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match=r"foreign.safetensors has no metadata of ours \(layout is None\)"):
        load_backbone(MobileNetV2(SMALL), tmp_path / "foreign.safetensors")


def test_damaged_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_weights(path, small_classifier(), WeightsInfo())
    save_file(load_file(path), path, read_metadata(path) | {"mean": "[0.5]"})
    with pytest.raises(ValueError, match=r"a.safetensors: its metadata cannot be read \(ValueError: not enough values"):
        load_backbone(MobileNetV2(SMALL), path)


def test_saving_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.pt: weights are written as .safetensors"):
        save_weights(tmp_path / "a.pt", small_classifier(), WeightsInfo())
    with pytest.raises(ValueError, match=r"2 class names for a classifier of 3 classes"):
        save_weights(tmp_path / "a.safetensors", small_classifier(), WeightsInfo(class_names=("a", "b")))


def test_failed_download_says_where_the_file_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(
        OSError, match=r"no route to host.*fetch it by hand and put it at .*checkpoints/mobilenet_v2-.*\.pth"
    ):
        load_backbone(MobileNetV2(MobileNetV2Config()), "torchvision:IMAGENET1K_V1")


def test_download_with_a_wrong_hash_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def download(url: str, destination: str, hash_prefix: str | None, progress: bool) -> None:
        assert hash_prefix == "b0353104", "the hash in the name of the file is checked"
        raise RuntimeError('invalid hash value (expected "b0353104", got "00")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"mobilenet_v2-b0353104.pth could not be downloaded \(invalid hash value"):
        load_backbone(MobileNetV2(MobileNetV2Config()), "torchvision:IMAGENET1K_V1")


def test_download_that_was_put_there_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision.models.mobilenet_v2()
    (tmp_path / "checkpoints").mkdir()
    torch.save(network.state_dict(), tmp_path / "checkpoints" / "mobilenet_v2-7ebf99e0.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    classifier = Classifier(ClassifierConfig(), 1000)
    info, _ = load_classifier(classifier, "torchvision")
    assert torch.equal(classifier.linear.weight, network.classifier[1].weight)
    assert info.class_names[:2] == ("tench", "goldfish")
    assert info.source.endswith("mobilenet_v2-7ebf99e0.pth")


def test_unknown_download() -> None:
    with pytest.raises(ValueError, match=r"torchvision has no weights 'V7'; there are: IMAGENET1K_V1, IMAGENET1K_V2"):
        load_backbone(MobileNetV2(MobileNetV2Config()), "torchvision:V7")


@pytest.mark.slow
@needs_shared("weights/mobilenet_v2_torchvision_layout.pt", "data/imagenet_val_800")
def test_accuracy_on_imagenet_images() -> None:
    folder = SHARED / "data" / "imagenet_val_800" / "ILSVRC2012_VAL_SET"
    records = [line.split(",") for line in (folder / "dataset.txt").read_text().splitlines() if line.strip()][::4]
    classifier = Classifier(ClassifierConfig(), 1000)
    info, remark = load_classifier(classifier, SHARED / "weights" / "mobilenet_v2_torchvision_layout.pt")
    assert remark == ""
    classifier.eval().to(memory_format=torch.channels_last)
    normalise = Normalise(info.mean, info.std)
    transform = EvalTransform(TransformConfig(eval_resize="squash"))
    counts = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        for start in range(0, len(records), 32):
            chunk = records[start : start + 32]
            images = torch.stack([torch.from_numpy(transform(read_image(folder / name), 0, 0)) for name, _ in chunk])
            logits = classifier(normalise(images.permute(0, 3, 1, 2)))
            counts += count_correct(logits, torch.tensor([int(label) for _, label in chunk]))
    top1, top5 = (counts / len(records)).tolist()
    print(f"top-1 {100 * top1:.2f} %, top-5 {100 * top5:.2f} % of {len(records)} images")
    assert len(records) == 200
    assert top1 == pytest.approx(0.77, abs=0.0051)  # one image; all 800: 0.7925
    assert top5 > 0.9
