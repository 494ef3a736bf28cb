"""Classifiers of other libraries, both ways, and the converting tool. Run: pytest tests/test_convert_weights.py"""

import copy
import io
import json
import math
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from shared_data import SHARED, needs_shared
from torch import Tensor, nn

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.layers import ConvNormAct, Normalise
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.foreign import to_timm, to_torchvision
from backbones.weights.info import WeightsInfo
from backbones.weights.layouts import DEEPER_BLOCKS, public_configs
from backbones.weights.native import (
    adopt_config,
    check_statistics,
    load_backbone,
    load_classifier,
    read_model,
    save_weights,
)
from backbones.weights.readers import WeightsFile, read_metadata
from backbones.weights.tflite import read_tflite, unfold_norms
from detection.classification.accuracy import count_correct
from detection.classification.config import TransformConfig
from detection.classification.data import EvalTransform
from detection.cli.convert_weights import main
from detection.engine.checkpoint import save_checkpoint
from detection.engine.plain import to_plain
from detection.images.decode import read_image
from detection.models.build import build_detector
from detection.models.ssdlite import SSDLiteConfig
from detection.postprocess import PostprocessConfig
from detection.weights.info import DetectorInfo
from detection.weights.native import DetectorFile, read_detector, read_file
from detection.weights.recognition import convert, unpack

NARROW = MobileNetV2Config(width=0.35)


def randomise(network: nn.Module) -> nn.Module:
    """Norms as after a training, so that no mistake in them is hidden by ones and zeros."""
    torch.manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def logits(network: nn.Module, size: int = 64) -> Tensor:
    torch.manual_seed(5)
    with torch.no_grad():
        result: Tensor = network(torch.randn(2, 3, size, size))
    return result


def assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def fail(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


TIMM_NAMES = [
    ("mobilenetv2_035", 0.35), ("mobilenetv2_050", 0.5), ("mobilenetv2_075", 0.75), ("mobilenetv2_100", 1.0),
    ("mobilenetv2_140", 1.4), ("mobilenetv2_110d", 1.1), ("mobilenetv2_120d", 1.2),
]  # fmt: skip


@pytest.mark.parametrize(("name", "width"), TIMM_NAMES)
def test_timm_both_ways(name: str, width: float, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    theirs = randomise(timm.create_model(name, num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    ours, info = read_model(tmp_path / "timm.pth")
    assert isinstance(ours, Classifier)
    assert ours.backbone.config.width == width
    assert ours.backbone.config.fixed_ends == name.endswith("d")
    assert info.layout == "timm"
    assert_same(logits(ours), logits(theirs))
    back = timm.create_model(name, num_classes=7)
    back.load_state_dict(to_timm(randomise(ours)), strict=True)  # type: ignore[arg-type]
    assert_same(logits(back.eval()), logits(ours))


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.4])
def test_torchvision_both_ways(width: float, tmp_path: Path) -> None:
    theirs = randomise(torchvision.models.mobilenet_v2(width_mult=width, num_classes=7))
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    ours, info = read_model(tmp_path / "theirs.pth")
    assert isinstance(ours, Classifier)
    assert (ours.backbone.config.width, info.layout) == (width, "torchvision")
    assert_same(logits(ours), logits(theirs))
    back = torchvision.models.mobilenet_v2(width_mult=width, num_classes=7)
    back.load_state_dict(to_torchvision(randomise(ours)), strict=True)  # type: ignore[arg-type]
    assert_same(logits(back.eval()), logits(ours))


def test_deeper_networks_are_timms() -> None:
    deeper = [config for config in public_configs() if config.fixed_ends]
    assert {config.width: tuple(row[2] for row in config.settings) for config in deeper} == DEEPER_BLOCKS
    backbone = MobileNetV2(deeper[1])
    assert (backbone.feature_specs["stem"].channels, backbone.feature_specs["last"].channels) == (32, 1280)
    assert MobileNetV2(MobileNetV2Config(width=1.2)).feature_specs["last"].channels == 1536


def test_weights_of_timm_in_their_other_files(tmp_path: Path) -> None:
    """The hub's .safetensors, and a training's checkpoint with the state dict in it; the backbone is filled from each."""
    classifier = randomise(Classifier(ClassifierConfig(backbone=NARROW), 3))
    assert isinstance(classifier, Classifier)
    state = {key: tensor.contiguous() for key, tensor in to_timm(classifier).items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "last.pth.tar")
    for name in ("model.safetensors", "last.pth.tar"):
        backbone = MobileNetV2(NARROW)
        assert load_backbone(backbone, tmp_path / name).layout == "timm"
        assert torch.equal(backbone.last.conv.weight, classifier.backbone.last.conv.weight)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd.pth holds a dict with the keys a, not a state dict"):
        read_model(tmp_path / "odd.pth")


def test_what_timm_has_not_cannot_go_there() -> None:
    config = MobileNetV2Config(width=0.35, padding="tf_same", norm_eps=1e-3)
    with pytest.raises(ValueError, match=r"timm's network was made for another backbone; set padding='symmetric'"):
        to_timm(Classifier(ClassifierConfig(backbone=config), 2))
    with pytest.raises(ValueError, match=r"torchvision's network.*set fixed_ends=False"):
        to_torchvision(Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=0.35, fixed_ends=True)), 2))


def test_config_is_taken_over(tmp_path: Path) -> None:
    in_file = MobileNetV2Config(width=0.35, padding="tf_same", norm_eps=1e-3)
    half = (0.5, 0.5, 0.5)
    save_weights(tmp_path / "a.safetensors", MobileNetV2(in_file), WeightsInfo(mean=half, std=half))
    asked = MobileNetV2Config(frozen_stages=2, freeze_norm=True, norm_momentum=0.05)
    config, info = adopt_config(asked, tmp_path / "a.safetensors")
    assert (config.width, config.padding, config.norm_eps) == (0.35, "tf_same", 1e-3)
    assert (config.frozen_stages, config.freeze_norm, config.norm_momentum) == (2, True, 0.05)
    assert info.mean == half
    torch.save(to_timm(Classifier(ClassifierConfig(backbone=NARROW), 2)), tmp_path / "b.pth")
    config, info = adopt_config(in_file, tmp_path / "b.pth")
    assert (config.width, config.padding, config.norm_eps, info.layout) == (0.35, "symmetric", 1e-5, "timm")
    assert adopt_config(in_file, "torchvision:IMAGENET1K_V1")[0] == MobileNetV2Config()
    # A network that nobody publishes is known to its user alone.
    own = MobileNetV2Config(width=0.35, settings=((1, 16, 1, 1), (6, 24, 1, 2), (6, 160, 2, 2)))
    torch.save(to_timm(Classifier(ClassifierConfig(backbone=own), 2)), tmp_path / "c.pth")
    assert adopt_config(own, tmp_path / "c.pth")[0] == own
    load_backbone(MobileNetV2(own), tmp_path / "c.pth")


def test_tool_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = randomise(Classifier(ClassifierConfig(backbone=NARROW), 3))
    assert isinstance(ours, Classifier)
    torch.save(to_torchvision(ours), tmp_path / "tv.pth")
    out = tmp_path / "new" / "ours.safetensors"
    (tmp_path / "names.txt").write_text("cat\ndog\n\nowl\n")
    main([str(tmp_path / "tv.pth"), str(out), "--class-names", str(tmp_path / "names.txt")])
    printed = capsys.readouterr().out
    assert "tv.pth: torchvision MobileNetV2 classifier" in printed
    assert "backbone MobileNetV2 x0.35, blocks 1 2 3 4 3 3 1" in printed
    assert "padding symmetric, batch norm epsilon 1e-05" in printed
    assert "3 classes: cat, dog, owl" in printed
    metadata = read_metadata(out)
    assert json.loads(metadata["class_names"]) == ["cat", "dog", "owl"]
    assert (metadata["layout"], metadata["original_layout"]) == ("litedet", "torchvision")
    assert metadata["source"].startswith("tv.pth, sha256 ")
    assert [file.name for file in out.parent.iterdir()] == ["ours.safetensors"]
    main([str(out), str(tmp_path / "timm.pth"), "--to", "timm"])
    main([str(tmp_path / "timm.pth"), str(tmp_path / "back.pth"), "--to", "torchvision"])
    first, last = (torch.load(tmp_path / name, weights_only=True) for name in ("tv.pth", "back.pth"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_wrong_source_is_answered_layer_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = to_timm(Classifier(ClassifierConfig(backbone=NARROW), 3))
    del state["blocks.3.1.bn2.running_var"]
    state["blocks.2.0.conv_dw.weight"] = torch.zeros(48, 1, 5, 5)
    state["blocks.2.0.se.conv_reduce.weight"] = torch.zeros(4)
    torch.save(state, tmp_path / "odd.pth")
    out = tmp_path / "out.safetensors"
    message = fail([str(tmp_path / "odd.pth"), str(out)], capsys)
    assert "odd.pth does not fit the network, nothing was loaded (3 of" in message
    assert "missing: backbone.stage4.1.depthwise.norm.running_var [144]" in message
    assert "not expected: blocks.2.0.se.conv_reduce.weight [4]" in message
    assert "backbone.stage3.0.depthwise.conv.weight: expected shape [48, 1, 3, 3], given [48, 1, 5, 5]" in message
    assert not out.exists()
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet.pth")
    message = fail([str(tmp_path / "resnet.pth"), str(out)], capsys)
    assert "its first keys are conv1.weight, bn1.weight" in message
    assert "known are torchvision's and timm's MobileNetV2 state dicts, TensorFlow Lite" in message
    assert list(tmp_path.glob("out*")) == []


def test_tools_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(to_timm(Classifier(ClassifierConfig(backbone=NARROW), 3)), tmp_path / "a.pth")
    source, out = str(tmp_path / "a.pth"), str(tmp_path / "o.safetensors")
    assert "no.pth does not exist; a weights file was expected" in fail([str(tmp_path / "no.pth"), out], capsys)
    assert "is a folder, not a weights file" in fail([str(tmp_path), out], capsys)
    assert "with --to timm the result is a .pth file" in fail([source, out, "--to", "timm"], capsys)
    assert "with --to litedet the result is a .safetensors file" in fail([source, "o.pt"], capsys)
    assert "a.pth is the file of the source" in fail([source, source, "--to", "timm"], capsys)
    assert "has 3 classes, 2 names were given" in fail([source, out, "--class-names", "cat,dog"], capsys)
    assert "names are missing or come twice" in fail([source, out, "--class-names", "cat,cat,owl"], capsys)
    assert "--max-images is at least 1" in fail([source, out, "--max-images", "0"], capsys)
    (tmp_path / "text.txt").write_text("no weights\n")
    assert "text.txt is not a weights file" in fail([str(tmp_path / "text.txt"), out], capsys)
    save_weights(tmp_path / "b.safetensors", MobileNetV2(NARROW), WeightsInfo())
    message = fail([str(tmp_path / "b.safetensors"), str(tmp_path / "b.pth"), "--to", "timm"], capsys)
    assert "only classifiers go to timm's layout; this is a MobileNetV2" in message
    assert not list(tmp_path.glob("o.*"))


@pytest.mark.parametrize("first_version", [False, True])
def test_a_training_of_a_classifier_becomes_a_file_of_weights(tmp_path: Path, first_version: bool) -> None:
    classifier = Classifier(ClassifierConfig(backbone=NARROW), 3).eval()
    record = {
        "model": to_plain(ClassifierConfig(backbone=NARROW)),
        "class_names": ["cat", "dog", "owl"],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    }
    if not first_version:
        record |= {"source": "trained on 6 images", "licence": "MIT"}
    save_checkpoint(tmp_path / "best.pt", {"weights": classifier.state_dict(), "extra": {"classifier": record}})
    main([str(tmp_path / "best.pt"), str(tmp_path / "out.safetensors")])
    again, info = read_model(tmp_path / "out.safetensors")
    assert isinstance(again, Classifier)
    assert same_tensors(again, classifier)
    assert info.class_names == ("cat", "dog", "owl")
    assert info.std == (0.25, 0.25, 0.25)
    assert info.source.startswith("best.pt of a training, sha256 " if first_version else "trained on 6 images, sha256 ")
    # A training starts from the checkpoint itself as well.
    file = read_file(tmp_path / "best.pt")
    assert isinstance(file, WeightsFile)
    other = Classifier(ClassifierConfig(backbone=NARROW), 3)
    assert load_classifier(other, file, ("cat", "dog", "owl"))[1] == ""
    assert same_tensors(other, classifier)
    with pytest.raises(UserError, match=r"best\.pt holds no detector but a backbone or classifier"):
        read_detector(tmp_path / "best.pt")


def test_a_training_of_a_detector_becomes_a_file_of_weights(tmp_path: Path) -> None:
    model = build_detector(SSDLiteConfig(backbone=NARROW, input_size=(96, 96)), 2).eval()
    info = DetectorInfo(
        model=model.config, postprocess=PostprocessConfig(), class_names=("cat", "dog"), category_ids=(3, 7)
    )
    plain = info.to_plain()
    del plain["model"]["kind"]  # the first version knew one kind and did not name it
    save_checkpoint(tmp_path / "best.pt", {"weights": model.state_dict(), "extra": {"detector": plain}})
    main([str(tmp_path / "best.pt"), str(tmp_path / "out.safetensors")])
    again, read = read_detector(tmp_path / "out.safetensors")
    assert same_tensors(again, model)
    assert read.source.startswith("best.pt, sha256 ")
    assert replace(read, source="") == info
    main([str(tmp_path / "best.pt"), str(tmp_path / "named.safetensors"), "--class-names", "Katze,Hund"])
    assert read_detector(tmp_path / "named.safetensors")[1].class_names == ("Katze", "Hund")
    file = read_file(tmp_path / "out.safetensors")
    assert isinstance(file, DetectorFile)
    other = MobileNetV2(NARROW)
    load_backbone(other, file.backbone())
    assert same_tensors(other, model.backbone)


def same_tensors(a: nn.Module, b: nn.Module) -> bool:
    own, other = a.state_dict(), b.state_dict()
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--list"])
    printed = capsys.readouterr().out
    assert "ssdlite_mobilenet_v2_coco: detector, 22 mAP on COCO" in printed
    assert (
        "http://download.tensorflow.org/models/object_detection/ssdlite_mobilenet_v2_coco_2018_05_09.tar.gz" in printed
    )


# ------------------------------------------------------------------------------------------------------ TensorFlow Lite


def write_tflite(path: Path, classifier: Classifier, *, quantised: bool = False, labels: tuple[str, ...] = ()) -> None:
    """A classifier as TensorFlow Lite has it: norms folded, operators in their order, float32 or uint8 weights."""
    tflite = pytest.importorskip("tflite")
    import flatbuffers

    builder = flatbuffers.Builder(1 << 20)
    buffers: list[bytes] = [b""]
    tensors: list[tuple[tuple[int, ...], int, int, float, int]] = []  # shape, type, buffer, scale, zero point
    operators: list[tuple[int, list[int], int, int, int, int]] = []  # code, inputs, output, stride, activation, kind

    def tensor(shape: tuple[int, ...], values: np.ndarray | None = None, scale: float = 0.0, zero: int = 0) -> int:
        kinds = {
            "float32": tflite.TensorType.FLOAT32,
            "uint8": tflite.TensorType.UINT8,
            "int32": tflite.TensorType.INT32,
        }
        buffer = 0
        if values is not None:
            buffers.append(values.tobytes())
            buffer = len(buffers) - 1
        tensors.append((shape, kinds[str(values.dtype)] if values is not None else 0, buffer, scale, zero))
        return len(tensors) - 1

    def layer(x: int, weight: Tensor, bias: Tensor, stride: int, relu6: bool, depthwise: bool) -> int:
        values = weight.permute((1, 2, 3, 0) if depthwise else (0, 2, 3, 1)).numpy()
        if quantised:
            scale, zero = float(np.ptp(values) / 255), 128
            steps = np.clip((values / scale + zero).round(), 0, 255).astype(np.uint8)
            w = tensor(values.shape, steps, scale, zero)
            b = tensor((len(bias),), (bias.numpy() / 1e-5).round().astype(np.int32), 1e-5, 0)
        else:
            w = tensor(values.shape, np.ascontiguousarray(values, np.float32))
            b = tensor((len(bias),), bias.numpy())
        out = tensor((1, 1, 1, len(bias)))
        operators.append((int(depthwise), [x, w, b], out, stride, 3 if relu6 else 0, 2 if depthwise else 1))
        return out

    x = tensor((1, 224, 224, 3))
    for module in classifier.backbone.modules():
        if isinstance(module, ConvNormAct):
            norm = module.norm
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight.detach() / (norm.running_var + norm.eps).sqrt()
            weight = module.conv.weight.detach() * scale[:, None, None, None]
            bias = norm.bias.detach() - norm.running_mean * scale
            depthwise = module.conv.groups > 1
            x = layer(x, weight, bias, module.stride, isinstance(module.act, nn.ReLU6), depthwise)
    out = layer(
        x, classifier.linear.weight.detach()[:, :, None, None], classifier.linear.bias.detach(), 1, False, False
    )

    buffer_offsets = []
    for content in buffers:
        data = builder.CreateByteVector(content) if content else 0
        tflite.BufferStart(builder)
        if content:
            tflite.BufferAddData(builder, data)
        buffer_offsets.append(tflite.BufferEnd(builder))
    tensor_offsets = []
    for index, (shape, kind, buffer, scale_, zero_) in enumerate(tensors):
        name = builder.CreateString(f"tensor{index}")
        shape_vector = builder.CreateNumpyVector(np.array(shape, np.int32))
        quantization = 0
        if scale_:
            scales = builder.CreateNumpyVector(np.array([scale_], np.float32))
            zeros = builder.CreateNumpyVector(np.array([zero_], np.int64))
            tflite.QuantizationParametersStart(builder)
            tflite.QuantizationParametersAddScale(builder, scales)
            tflite.QuantizationParametersAddZeroPoint(builder, zeros)
            quantization = tflite.QuantizationParametersEnd(builder)
        tflite.TensorStart(builder)
        tflite.TensorAddName(builder, name)
        tflite.TensorAddShape(builder, shape_vector)
        tflite.TensorAddType(builder, kind)
        tflite.TensorAddBuffer(builder, buffer)
        if quantization:
            tflite.TensorAddQuantization(builder, quantization)
        tensor_offsets.append(tflite.TensorEnd(builder))
    operator_offsets = []
    for code, inputs, output, stride, activation, options_type in operators:
        name = "DepthwiseConv2DOptions" if code else "Conv2DOptions"
        getattr(tflite, f"{name}Start")(builder)
        getattr(tflite, f"{name}AddPadding")(builder, tflite.Padding.SAME)
        getattr(tflite, f"{name}AddStrideH")(builder, stride)
        getattr(tflite, f"{name}AddStrideW")(builder, stride)
        getattr(tflite, f"{name}AddFusedActivationFunction")(builder, activation)
        options = getattr(tflite, f"{name}End")(builder)
        input_vector = builder.CreateNumpyVector(np.array(inputs, np.int32))
        output_vector = builder.CreateNumpyVector(np.array([output], np.int32))
        tflite.OperatorStart(builder)
        tflite.OperatorAddOpcodeIndex(builder, code)
        tflite.OperatorAddInputs(builder, input_vector)
        tflite.OperatorAddOutputs(builder, output_vector)
        tflite.OperatorAddBuiltinOptionsType(builder, options_type)
        tflite.OperatorAddBuiltinOptions(builder, options)
        operator_offsets.append(tflite.OperatorEnd(builder))

    def vector(offsets: list[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    tensor_vector, operator_vector = vector(tensor_offsets), vector(operator_offsets)
    inputs_vector = builder.CreateNumpyVector(np.array([0], np.int32))
    outputs_vector = builder.CreateNumpyVector(np.array([out], np.int32))
    tflite.SubGraphStart(builder)
    tflite.SubGraphAddTensors(builder, tensor_vector)
    tflite.SubGraphAddInputs(builder, inputs_vector)
    tflite.SubGraphAddOutputs(builder, outputs_vector)
    tflite.SubGraphAddOperators(builder, operator_vector)
    graphs = vector([tflite.SubGraphEnd(builder)])
    codes = []
    for code in (tflite.BuiltinOperator.CONV_2D, tflite.BuiltinOperator.DEPTHWISE_CONV_2D):
        tflite.OperatorCodeStart(builder)
        tflite.OperatorCodeAddDeprecatedBuiltinCode(builder, code)
        tflite.OperatorCodeAddBuiltinCode(builder, code)
        codes.append(tflite.OperatorCodeEnd(builder))
    code_vector, buffer_vector = vector(codes), vector(buffer_offsets)
    tflite.ModelStart(builder)
    tflite.ModelAddVersion(builder, 3)
    tflite.ModelAddOperatorCodes(builder, code_vector)
    tflite.ModelAddSubgraphs(builder, graphs)
    tflite.ModelAddBuffers(builder, buffer_vector)
    builder.Finish(tflite.ModelEnd(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    if labels:
        import zipfile

        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("labels.txt", "\n".join(labels) + "\n")


@pytest.fixture(scope="module")
def tensorflows() -> Classifier:
    config = MobileNetV2Config(width=0.35, padding="tf_same", norm_eps=1e-3)
    classifier = randomise(Classifier(ClassifierConfig(backbone=config), 1001))
    assert isinstance(classifier, Classifier)
    nn.init.normal_(classifier.linear.weight, std=0.1)
    return classifier


@pytest.mark.parametrize(("quantised", "tolerance"), [(False, 1e-4), (True, 0.2)])
def test_tflite_classifier_without_its_background(
    tensorflows: Classifier, tmp_path: Path, quantised: bool, tolerance: float
) -> None:
    names = ("background", *(f"class {i}" for i in range(1000)))
    write_tflite(tmp_path / "a.tflite", tensorflows, quantised=quantised, labels=names)
    ours, info, remarks = read_tflite(tmp_path / "a.tflite")
    assert ours.num_classes == 1000
    assert (info.class_names[0], info.mean, info.std) == ("class 0", (0.5,) * 3, (0.5,) * 3)
    assert (ours.backbone.config.padding, ours.backbone.config.width) == ("tf_same", 0.35)
    assert "class 0 of 1001 is the background and was dropped" in remarks[0]
    expected = logits(tensorflows)[:, 1:]
    assert (logits(ours) - expected).abs().max() < tolerance * expected.abs().max()


def test_unfolded_norms_change_nothing_and_can_be_trained_on(tensorflows: Classifier, tmp_path: Path) -> None:
    write_tflite(tmp_path / "a.tflite", tensorflows)
    ours, _, _ = read_tflite(tmp_path / "a.tflite")
    before = logits(ours)
    torch.manual_seed(0)
    batches = [torch.randn(8, 3, 64, 64) for _ in range(3)]
    assert unfold_norms(ours, batches) == 24
    torch.testing.assert_close(logits(ours), before, rtol=1e-4, atol=1e-4)
    # What the norms saw is what they are told: the stem's output over the same images.
    with torch.no_grad():
        out = torch.cat([nn.functional.pad(x, (0, 1, 0, 1)) for x in batches])
        out = nn.functional.conv2d(out, ours.backbone.stem.conv.weight, stride=2)
    norm = ours.backbone.stem.norm
    torch.testing.assert_close(norm.running_mean, out.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norm.running_var, out.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-5)
    # In training mode the statistics of a batch stand in: nearly the same function, where it was destroyed before.
    folded, _, _ = read_tflite(tmp_path / "a.tflite")

    def training_error(network: Classifier) -> float:
        network.backbone.train()
        with torch.no_grad():
            error = (network(batches[0]) - expected).abs().mean() / expected.abs().mean()
        network.eval()
        return float(error)

    with torch.no_grad():
        expected = ours(batches[0])
    assert training_error(folded) > 5 * training_error(ours)
    with pytest.raises(ValueError, match="no images to measure"):
        unfold_norms(ours, [])


def test_tflite_of_another_network_is_answered_layer_by_layer(
    tensorflows: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = Classifier(
        ClassifierConfig(backbone=MobileNetV2Config(width=0.35, settings=((1, 16, 1, 1), (6, 24, 1, 1)))), 5
    )
    write_tflite(tmp_path / "odd.tflite", odd.eval())
    message = fail([str(tmp_path / "odd.tflite"), str(tmp_path / "o.safetensors")], capsys)
    assert "odd.tflite holds no MobileNetV2 classifier that is known here, nothing was read" in message
    assert (
        "stage2.0.depthwise: expected depthwise [48, 1, 3, 3], stride 2, activation relu6; the file has depthwise"
        in (message)
    )
    assert "missing" in message
    (tmp_path / "cut.tflite").write_bytes((tmp_path / "odd.tflite").read_bytes()[:64])
    assert "error:" in fail([str(tmp_path / "cut.tflite"), str(tmp_path / "o.safetensors")], capsys)
    assert not list(tmp_path.glob("o.*"))


def test_tflite_with_a_number_that_is_none(tensorflows: Classifier, tmp_path: Path) -> None:
    damaged = copy.deepcopy(tensorflows)
    with torch.no_grad():
        damaged.linear.bias[7] = math.nan
    write_tflite(tmp_path / "a.tflite", damaged)
    with pytest.raises(
        ValueError, match=r"a\.tflite holds values that are no finite numbers, in 1 of .*: linear\.bias\."
    ):
        read_tflite(tmp_path / "a.tflite")


def test_tool_measures_statistics(tensorflows: Classifier, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tflite(tmp_path / "a.tflite", tensorflows)
    folder = tmp_path / "images" / "inner"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index in range(5):
        cv2.imwrite(str(folder / f"{index}.png"), rng.integers(0, 256, (70, 80, 3), np.uint8))
    (folder / "rotten.jpg").write_bytes(b"rotten")
    out = tmp_path / "o.safetensors"
    main([str(tmp_path / "a.tflite"), str(out), "--statistics-from", str(folder.parent), "--image-size", "64"])
    printed = capsys.readouterr().out
    assert "batch norm statistics measured on 5 images" in printed
    assert "rotten.jpg: the image does not decode" in printed
    classifier = Classifier(ClassifierConfig(backbone=adopt_config(MobileNetV2Config(), out)[0]), 1000)
    load_classifier(classifier, out)
    assert float(classifier.backbone.stem.norm.running_var.std()) > 0
    check_statistics(classifier.backbone, out)
    main([str(tmp_path / "a.tflite"), str(out)])
    assert "the batch norms stay folded: good for prediction, not for training" in capsys.readouterr().out
    load_classifier(classifier, out)
    with pytest.raises(ValueError, match=r"o.safetensors has its batch norms folded .* --statistics-from FOLDER"):
        check_statistics(classifier.backbone, out)
    frozen = MobileNetV2(replace(classifier.backbone.config, freeze_norm=True))
    load_backbone(frozen, out)
    check_statistics(frozen, out)
    check_statistics(MobileNetV2(NARROW), "nowhere")
    assert "no is not a folder" in fail([str(tmp_path / "a.tflite"), str(out), "--statistics-from", "no"], capsys)
    (tmp_path / "empty").mkdir()
    message = fail([str(tmp_path / "a.tflite"), str(out), "--statistics-from", str(tmp_path / "empty")], capsys)
    assert "empty has no images" in message


# ------------------------------------------------------------------------------------------------------------- archives


def test_an_archive_is_looked_into(tensorflows: Classifier, tmp_path: Path) -> None:
    write_tflite(tmp_path / "a.tflite", tensorflows)
    content = (tmp_path / "a.tflite").read_bytes()
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for name, data in (("../../evil.txt", b"evil"), ("folder/../../a.tflite", content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        link = tarfile.TarInfo("link.tflite")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    (tmp_path / "into").mkdir()
    assert unpack(tmp_path / "a.tgz", tmp_path / "into") == tmp_path / "into" / "a.tflite"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tflite", "a.tgz", "into"], (
        "nothing beside the folder"
    )
    converted = convert(tmp_path / "a.tgz")
    assert converted.layout == "TensorFlow Lite MobileNetV2 classifier"
    assert converted.info.source.startswith("a.tflite, sha256 ")
    assert converted.info.source.endswith(" in a.tgz")


def test_archives_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("hello")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "readme.txt", "x/readme.txt")
    with pytest.raises(
        ValueError, match=r"expected one frozen_inference_graph.pb or one .tflite in it, found 0 \(x/readme"
    ):
        convert(tmp_path / "a.tar.gz")
    whole = bytearray((tmp_path / "a.tar.gz").read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(bytes(whole[: len(whole) // 2]))
    with pytest.raises(ValueError, match=r"b.tar.gz cannot be unpacked, it is damaged or not whole"):
        convert(tmp_path / "b.tar.gz")


# -------------------------------------------------------------------------------------------------------- real images


def imagenet_batches(size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    folder = SHARED / "data" / "imagenet_val_800" / "ILSVRC2012_VAL_SET"
    records = [line.split(",") for line in (folder / "dataset.txt").read_text().splitlines() if line.strip()][::4]
    transform = EvalTransform(TransformConfig(eval_resize="squash"))
    for start in range(0, len(records), size):
        chunk = records[start : start + size]
        images = torch.stack([torch.from_numpy(transform(read_image(folder / name), 0, 0)) for name, _ in chunk])
        yield images.permute(0, 3, 1, 2), torch.tensor([int(label) for _, label in chunk])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "top1", "symmetric_top1"),
    # of 200 images; all 800: 0.791 and 0.771, 0.795 and 0.759
    [("mobilenet_v2_1.0_224_quant", 0.82, 0.80), ("tf2_mobilenet_v2_1.0_224_ptq", 0.81, 0.775)],
)
@needs_shared("weights/mobilenet_v2_1.0_224_quant.tflite", "data/imagenet_val_800")
def test_accuracy_with_and_without_tensorflows_padding(name: str, top1: float, symmetric_top1: float) -> None:
    """Padding is part of the weights: the same numbers lose points with the padding of torch."""
    pytest.importorskip("tflite")
    classifier, info, _ = read_tflite(SHARED / "weights" / f"{name}.tflite")
    symmetric = Classifier(
        ClassifierConfig(backbone=MobileNetV2Config(norm_eps=classifier.backbone.config.norm_eps)), 1000
    )
    symmetric.load_state_dict(classifier.state_dict())
    networks = [network.eval().to(memory_format=torch.channels_last) for network in (classifier, symmetric)]
    normalise = Normalise(info.mean, info.std)
    counts = torch.zeros(2, dtype=torch.int64)
    total = 0
    with torch.inference_mode():
        for images, labels in imagenet_batches():
            inputs = normalise(images)
            counts += torch.stack([count_correct(network(inputs), labels, (1,))[0] for network in networks])
            total += len(labels)
    measured = (counts / total).tolist()
    print(f"{name}: top-1 {100 * measured[0]:.2f} %, with symmetric padding {100 * measured[1]:.2f} %")
    assert total == 200
    assert measured[0] == pytest.approx(top1, abs=0.0051)  # one image
    assert measured[1] == pytest.approx(symmetric_top1, abs=0.0051)
