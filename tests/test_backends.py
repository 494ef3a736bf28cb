"""What can run the network: all say the same, and what is missing is named. Run: pytest tests/test_backends.py"""

import copy
import functools
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from test_predictor import small_detector, small_predictor
from torch import Tensor

from backbones.errors import UserError
from backbones.layers import PaddingMode
from backbones.mobilenetv2 import MobileNetV2Config
from detection.inference.packed import PackedRunner, _PackedResidual, can_pack
from detection.inference.predictor import Predictor, load_detector
from detection.inference.runners import (
    Backend,
    OnnxRuntimeRunner,
    OpenVinoRunner,
    TorchRunner,
    build_runner,
    threads_for,
    to_onnx,
)
from detection.models.folding import fold_norms
from detection.models.ssdlite import SSDLite, SSDLiteConfig
from detection.structures import RawPredictions, run_in_parts
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
    runner = build_runner(model, backend, CPU)
    for batch_size in (1,) if backend == "compile" else (1, 3):  # a second size is a second compilation, a minute
        images = torch.randint(0, 256, (batch_size, 96, 128, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        with torch.inference_mode():
            expected, found = model(images), runner(images)
        assert expected.class_logits.std() > 0.1
        torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.anchors, expected.anchors)


@pytest.mark.parametrize(
    ("folded", "padding", "residual", "sums_inside"),
    [(True, "symmetric", "identity", 10), (True, "tf_same", "projection", 0), (False, "tf_same", "identity", 0)],
)
def test_packed_convolutions_say_the_same(
    folded: bool, padding: PaddingMode, residual: Literal["identity", "projection"], sums_inside: int
) -> None:
    if not can_pack():
        pytest.skip("this processor or this torch has no packed convolutions")
    torch.manual_seed(0)
    config = SSDLiteConfig(
        backbone=MobileNetV2Config(width=0.35, padding=padding, residual=residual), input_size=(96, 128)
    )
    model = SSDLite(config, 3).to(memory_format=torch.channels_last)
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.momentum = 1.0  # statistics of the images below: answers of a size that can be compared
    with torch.no_grad():
        model(torch.randint(0, 256, (4, 3, 96, 128), dtype=torch.uint8))
    model = fold_norms(model.eval()) if folded else model.eval()
    keys, plain = list(model.state_dict()), copy.deepcopy(model)
    runner = PackedRunner(model)
    assert list(model.state_dict()) == keys, "the detector itself stays as it was"
    assert not any(isinstance(layer, torch.nn.Conv2d) for layer in runner._packed.modules())
    assert sum(isinstance(layer, _PackedResidual) for layer in runner._packed.modules()) == sums_inside
    for batch_size, dtype in ((1, torch.uint8), (3, torch.float32)):
        for call in range(4):  # of modules, then of the trace; in both layouts
            images = torch.randint(0, 256, (batch_size, 3, 96, 128), dtype=torch.uint8).to(dtype)
            images = images if call % 2 else images.contiguous(memory_format=torch.channels_last)
            with torch.inference_mode():
                expected, found = plain(images), runner(images)
            assert ((images.shape, dtype) in runner._traces) == (call >= 2)
            assert expected.class_logits.std() > 0.01
            # Plain float32 is 1.6e-4 from float64 here; how the sums of the two differ depends on the processor.
            torch.testing.assert_close(found.codes, expected.codes, rtol=1e-4, atol=5e-4)
            torch.testing.assert_close(found.class_logits, expected.class_logits, rtol=1e-4, atol=5e-4)
            assert found.anchors.equal(expected.anchors)


def test_four_traces_are_kept_and_a_wrong_size_is_refused() -> None:
    if not can_pack():
        pytest.skip("this processor or this torch has no packed convolutions")
    torch.manual_seed(0)
    config = SSDLiteConfig(backbone=MobileNetV2Config(width=0.35), input_size=(96, 96))
    runner = PackedRunner(SSDLite(config, 3).eval())
    for batch_size in (1, 2, 3, 4, 5):
        images = torch.randint(0, 256, (batch_size, 3, 96, 96), dtype=torch.uint8)
        for _ in range(4):
            assert len(runner(images).codes) == batch_size
    assert [kind[0][0] for kind in runner._traces] == [1, 2, 3, 4]
    for _ in range(4):
        with pytest.raises(ValueError, match="96"):
            runner(torch.zeros(1, 3, 64, 96, dtype=torch.uint8))
    found, again = runner(images[:1]), runner(images[1:2])
    assert not found.codes.equal(again.codes), "what was returned is not written over"
    copied = pickle.loads(pickle.dumps(runner))
    assert torch.equal(copied(images[:1]).codes, runner._packed(images[:1]).codes)


def test_threads_that_trace_at_once() -> None:
    if not can_pack():
        pytest.skip("this processor or this torch has no packed convolutions")
    before = torch.nn.Module.__call__, torch.nn.Module.__getattr__
    runner = build_runner(small_detector()[0])
    assert isinstance(runner, PackedRunner)
    images = torch.randint(0, 256, (12, 3, 96, 128), dtype=torch.uint8)
    expected = [runner._packed(image[None]).codes for image in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: runner(image[None]).codes, images))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert (torch.nn.Module.__call__, torch.nn.Module.__getattr__) == before
    assert len(runner._traces) == 1


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
        build_runner(small_detector()[0], backend)


@functools.cache
def exported_predictor(backend: Backend) -> Predictor:
    """One for all tests: an export takes ten seconds or more."""
    if backend == "torch":
        return small_predictor()
    pytest.importorskip("onnxscript")
    pytest.importorskip(backend)
    model, info = small_detector()
    make = OnnxRuntimeRunner if backend == "onnxruntime" else OpenVinoRunner
    return Predictor(make(exported(), model.anchors), info)


@functools.cache
def exported() -> bytes:
    return to_onnx(fold_norms(small_detector()[0]))


_DROPPED = """
import os, pathlib, signal, sys, threading
import torch
from detection.inference.runners import OpenVinoRunner

def make():
    return OpenVinoRunner(pathlib.Path(sys.argv[1]).read_bytes(), torch.zeros(1, 4), num_threads=1)

def signalled():
    os.kill(os.getpid(), signal.SIGTERM)

signal.signal(signal.SIGTERM, lambda *_: print("handled", flush=True))
first, second = make(), make()
del first
del second
signalled()
runners = [make()]
thread = threading.Thread(target=runners.clear)
thread.start()
thread.join()
signalled()
"""


def test_signals_are_handled_after_openvino_runners_were_dropped(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 4]) for name in ("images", "codes")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["codes"])], "g", ends[:1], ends[1:])
    opset = onnx.helper.make_opsetid("", 18)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9), tmp_path / "a.onnx")
    done = subprocess.run(
        [sys.executable, "-c", _DROPPED, str(tmp_path / "a.onnx")],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n" * 2, "")


class Own:
    """A runner with threads of its own."""

    own_threads = True

    def __call__(self, images: Tensor) -> RawPredictions:
        raise NotImplementedError


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_torch_leaves_the_cores_to_a_runner_with_threads_of_its_own() -> None:
    with threads_for(Own()):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with threads_for(lambda images: RawPredictions(images, images, images)):
        assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_predictions_at_once_leave_the_number_of_threads() -> None:
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with threads_for(Own()):
            first_is_in.set()
            assert second_is_in.wait(10)
        first_is_out.set()

    def second() -> int:
        assert first_is_in.wait(10)
        with threads_for(Own()):
            inside = torch.get_num_threads()
            second_is_in.set()
            assert first_is_out.wait(10)
        return inside

    with ThreadPoolExecutor(2) as pool:
        begun, inside = pool.submit(first), pool.submit(second)
        begun.result()
        assert inside.result() == 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, "a thread begun later has them all"
    assert torch.get_num_threads() == 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_four_threads_get_what_one_gets(backend: Backend) -> None:
    predictor = exported_predictor(backend)
    images = list(np.random.default_rng(0).integers(0, 256, (24, 60, 80, 3), dtype=np.uint8))
    alone = [predictor(image) for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(predictor, images))
    for one, other in zip(alone, together, strict=True):
        assert len(one) > 0
        torch.testing.assert_close(other.boxes, one.boxes, rtol=0, atol=1e-4)
        torch.testing.assert_close(other.scores, one.scores, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_a_predictor_is_copied_and_pickled(backend: Backend) -> None:
    predictor = exported_predictor(backend)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected = predictor(image)
    for other in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert type(other.runner) is type(predictor.runner)
        assert other.info == predictor.info
        assert torch.equal(other(image).scores, expected.scores)


def test_half_precision_where_the_device_has_it() -> None:
    model, info = small_detector()
    predictor = Predictor(build_runner(model, amp="bf16"), info)
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    expected = small_predictor()(image)
    assert predictor(image).scores.dtype == torch.float32
    assert predictor(image).scores[0] == pytest.approx(expected.scores[0].item(), abs=0.02)
    with pytest.raises(UserError, match="'fp16' needs a GPU"):
        build_runner(model, amp="fp16")
    with pytest.raises(UserError, match="openvino computes in float32 here"):
        build_runner(model, "openvino", amp="bf16")
    with pytest.raises(UserError, match="amp 'half' is unknown"):
        build_runner(model, amp="half")  # type: ignore[arg-type]


def test_unknown_backends_are_named() -> None:
    with pytest.raises(
        UserError, match="'tensorrt' is unknown; there are 'torch', 'compile', 'onnxruntime', 'openvino'"
    ):
        build_runner(small_detector()[0], "tensorrt")  # type: ignore[arg-type]


def test_a_model_stays_as_it_is_when_it_is_run() -> None:
    model, _ = small_detector()
    model.train()
    keys = list(model.state_dict())
    build_runner(model)
    runner = TorchRunner(model, CPU)
    with torch.inference_mode():
        runner(torch.zeros(1, 3, 96, 128, dtype=torch.uint8))
    assert model.training
    assert list(model.state_dict()) == keys
    assert not any(norm.num_batches_tracked for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d))


def test_a_runner_is_given_no_more_than_it_takes() -> None:
    sizes = []

    class Small:
        max_batch = 2

        def __call__(self, images: Tensor) -> RawPredictions:
            sizes.append(len(images))
            means = images.float().mean((1, 2, 3))[:, None, None]
            return RawPredictions(means.expand(-1, 1, 4), means, torch.zeros(1, 4))

    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 8, 8)
    raw = run_in_parts(Small(), images)
    assert sizes == [2, 2, 1]
    assert raw.class_logits.flatten().tolist() == [0, 1, 2, 3, 4]
    assert raw.codes.shape == (5, 1, 4)


def test_cpu_backends_refuse_other_devices() -> None:
    with pytest.raises(ValueError, match="backend openvino runs on the CPU here, the device is meta"):
        build_runner(small_detector()[0], "openvino", torch.device("meta"))


def test_the_package_imports_no_backend() -> None:
    names = "('onnx', 'onnxruntime', 'openvino')"
    code = f"import detection.inference.predictor, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
@pytest.mark.oldest
def test_the_onnx_file_takes_images_as_they_are() -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    graph = onnx.load_from_string(exported()).graph
    tensor = graph.input[0].type.tensor_type
    assert [value.name for value in graph.input] == ["images"]
    assert [value.name for value in graph.output] == ["codes", "class_logits"]
    assert tensor.elem_type == onnx.TensorProto.UINT8
    assert [size.dim_value for size in tensor.shape.dim] == [0, 3, 96, 128]  # 0: any batch size
