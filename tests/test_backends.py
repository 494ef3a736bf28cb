"""What can run the network: all say the same, and what is missing is named. Run: pytest tests/test_backends.py"""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_predictor import small_detector

from backbones.layers import PaddingMode
from backbones.mobilenetv2 import MobileNetV2Config
from detection.inference.predictor import Predictor, fold_norms, load_detector
from detection.inference.runners import Backend, _can_pack, build_network, threads_for, to_onnx
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.weights.native import save_detector

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["compile", "onnxruntime", "openvino"])
def test_all_say_the_same(backend: Backend) -> None:
    if backend != "compile":
        pytest.importorskip("onnxscript")
        pytest.importorskip(backend)
    model = fold_norms(small_detector()[0])
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            if name.endswith("weight"):
                parameter *= 3  # answers of the size that a trained network gives
    network = build_network(model, backend, CPU)
    for batch_size in (1,) if backend == "compile" else (1, 3):  # a second size is a second compilation, a minute
        images = torch.randint(0, 256, (batch_size, 96, 128, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        with torch.inference_mode():
            expected, found = model(images), network(images)
        assert expected.class_logits.std() > 0.1
        torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.anchors, expected.anchors)


@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
@pytest.mark.parametrize("folded", [True, False])
def test_packed_convolutions_say_the_same(folded: bool, padding: PaddingMode) -> None:
    if not _can_pack():
        pytest.skip("this processor or this torch has no packed convolutions")
    torch.manual_seed(0)
    config = SSDLiteConfig(backbone=MobileNetV2Config(width=0.35, padding=padding), input_size=(96, 128))
    model = SSDLite(config, 3).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0  # statistics of the images below: answers of a size that can be compared
    with torch.no_grad():
        model(torch.randint(0, 256, (4, 3, 96, 128), dtype=torch.uint8))
    model = fold_norms(model.eval()) if folded else model.eval()
    keys, plain = list(model.state_dict()), copy.deepcopy(model)
    network = build_network(model, "torch", CPU)
    assert list(model.state_dict()) == keys, "the detector itself stays as it was"
    assert not any(isinstance(layer, torch.nn.Conv2d) for layer in network.modules())
    for batch_size in (1, 3):
        images = torch.randint(0, 256, (batch_size, 3, 96, 128), dtype=torch.uint8)
        with torch.inference_mode():
            expected, found = plain(images), network(images)
        assert expected.class_logits.std() > 0.01
        torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_predictor_finds_the_same_with_another_backend(backend: Backend, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip(backend)
    save_detector(tmp_path / "d.safetensors", *small_detector())
    expected, found = (
        load_detector(tmp_path / "d.safetensors", device="cpu", score_threshold=0.01, backend=name)
        for name in ("torch", backend)
    )
    first, second = np.random.default_rng(0).integers(0, 256, (2, 150, 200, 3), dtype=np.uint8)
    theirs = found(first)
    found(second)  # must not write over the answer before
    torch.testing.assert_close(theirs.boxes, expected(first).boxes, rtol=1e-3, atol=0.05)
    torch.testing.assert_close(theirs.scores, expected(first).scores, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_missing_package_is_named(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, backend, None)
    monkeypatch.setattr("detection.inference.runners.to_onnx", lambda model: b"")
    with pytest.raises(ValueError, match=rf"needs the package {backend}.*pip install 'litedet\[export\]'"):
        Predictor(*small_detector(), CPU, backend)


@pytest.mark.parametrize(("backend", "expected"), [("torch", 2), ("compile", 2), ("onnxruntime", 1), ("openvino", 1)])
def test_torch_leaves_the_cores_to_a_backend_with_threads_of_its_own(backend: Backend, expected: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threads_for(backend):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_cpu_backends_refuse_other_devices() -> None:
    with pytest.raises(ValueError, match="backend openvino runs on the CPU here, the device is meta"):
        build_network(small_detector()[0], "openvino", torch.device("meta"))


def test_the_package_imports_no_backend() -> None:
    names = "('onnx', 'onnxruntime', 'openvino')"
    code = f"import detection.inference.predictor, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_onnx_file_takes_images_as_they_are() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graph = onnx.load_from_string(to_onnx(small_detector()[0])).graph
    tensor = graph.input[0].type.tensor_type
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["codes", "class_logits"]
    assert tensor.elem_type == onnx.TensorProto.UINT8
    assert [size.dim_value for size in tensor.shape.dim] == [0, 3, 96, 128]  # 0: any batch size
