"""What only a GPU can show. Run on a machine that has one: pytest -n 0 tests/test_cuda.py

Everything else about CUDA is traced without a GPU (fake CUDA tensors in test_model.py, test_litedet.py and test_postprocess.py).
"""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_litedet import SMALL as SMALL_LITEDET
from test_litedet import small_step as litedet_step
from test_model import small_step as ssd_step
from test_model import training_batch

from detection import load_detector
from detection.cli.eval import main as eval_det
from detection.cli.train import main as train_det
from detection.cli.train_cls import main as train_cls
from detection.data.augment import EvalTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset
from detection.data.drawn import DetectionSet, draw_classification_set, draw_detection_set
from detection.data.loader import build_loader
from detection.engine.checkpoint import load_checkpoint
from detection.engine.loop import TrainResult, _Loop
from detection.models.litedet import LiteDet
from detection.postprocess import PostprocessConfig, build_postprocess

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return draw_detection_set(tmp_path_factory.mktemp("drawn"), 48, 16, (128, 128), 0)


def command(drawn: DetectionSet, kind: str, run_dir: Path, *more: str) -> list[str]:
    return [
        f"{ROOT}/configs/finetune.py:{kind}",
        *("--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)),
        *("--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)),
        *("--run-dir", str(run_dir), "--data.workers", "2", "--model.backbone.width", "0.35"),
        *("--model.input-size", "128", "128", "--train.batch-size", "8", "--model.backbone.frozen-stages", "0"),
        *more,
    ]


@pytest.fixture
def exact() -> Iterator[None]:
    """float32 without TF32, whatever a training in this process has set before."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


STEPS: dict[str, Callable[[], torch.nn.Module]] = {
    "cross_entropy": lambda: ssd_step("cross_entropy"),
    "focal": lambda: ssd_step("focal"),
    "litedet": litedet_step,
    "one_to_one": lambda: litedet_step(3, True),
}


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("num_objects", [0, 7])
def test_losses_and_gradients_are_those_of_the_cpu(kind: str, num_objects: int, exact: None) -> None:
    torch.manual_seed(0)
    step, batch = STEPS[kind](), training_batch(4, num_objects)
    on_cpu = {name: loss.item() for name, loss in step(*batch).items()}
    step(*batch)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in step.named_parameters() if p.grad is not None}
    step.zero_grad()
    step.cuda()
    losses = step(*(tensor.cuda() for tensor in batch))
    losses["loss"].backward()
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(on_cpu, rel=1e-3, abs=1e-5)
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, parameter in step.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            assert (parameter.grad.cpu() - expected[name]).norm() < 1e-2 * whole, name


@pytest.mark.parametrize("batch_size", [1, 8])
def test_detections_are_those_of_the_cpu(batch_size: int, exact: None) -> None:
    torch.manual_seed(0)
    model = LiteDet(SMALL_LITEDET.replaced(input_size=(128, 128)), 3).eval()
    postprocess = build_postprocess(model.config, PostprocessConfig(score_threshold=0.05))
    images = torch.randint(0, 256, (batch_size, 3, 128, 128), dtype=torch.uint8)
    with torch.inference_mode():
        raw = model(images)
        raw = raw._replace(class_logits=3 * torch.randn_like(raw.class_logits))  # no two scores alike
        places = torch.tensor([[1.0, 1.0, 0.0, 0.0]] * batch_size), torch.tensor([[128, 128]] * batch_size)
        on_cpu = postprocess(raw, *places)
        on_gpu = postprocess(type(raw)(*(value.cuda() for value in raw)), *places)
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert len(one) == len(other) > 10
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
        np.testing.assert_array_equal(one.labels, other.labels)
        np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-2)


def without_waits(method: Callable[..., Any], called: list[str]) -> Callable[..., Any]:
    """The method of the loop, in which every wait for the GPU raises, but for the first steps, which make what stays."""

    def call(self: _Loop, *args: Any) -> Any:
        if self.state.step < 2:
            return method(self, *args)
        called.append(method.__name__)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it is a prototype, and says so
                torch.cuda.set_sync_debug_mode("error")
            return method(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return call


@pytest.mark.parametrize(("kind", "amp"), [("ssdlite", "fp16"), ("ssdlite", "off"), ("litedet", "bf16")])
def test_no_step_of_a_training_waits_for_the_gpu(
    kind: str, amp: str, drawn: DetectionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    for name in ("_forward_and_backward", "_update"):
        monkeypatch.setattr(_Loop, name, without_waits(getattr(_Loop, name), called))
    train_det(command(drawn, kind, tmp_path / "run", "--train.epochs", "1", "--train.amp", amp))
    assert called.count("_update") == called.count("_forward_and_backward") == 4


@pytest.fixture(scope="module")
def trained(drawn: DetectionSet, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    run_dir = tmp_path_factory.mktemp("run") / "trained"
    return train_det(command(drawn, "litedet", run_dir, "--train.epochs", "12", "--train.amp", "bf16"))


def test_a_training_in_half_precision_learns(trained: TrainResult) -> None:
    records = [json.loads(line) for line in (trained.last_path.parent / "metrics.jsonl").read_text().splitlines()]
    losses = [record["losses"]["loss"] for record in records]
    assert losses[-1] < 0.8 * losses[0]
    assert trained.metrics["AP"] > 0.01


def test_a_detector_says_the_same_on_both(
    trained: TrainResult, drawn: DetectionSet, tmp_path: Path, exact: None
) -> None:
    images = [str(path) for path in sorted(Path(drawn.val_images).iterdir())]
    on_cpu, on_gpu = (load_detector(trained.best_path, device=device) for device in ("cpu", "cuda"))
    assert on_gpu.device.type == "cuda"
    for one, other in zip(on_cpu(images), on_gpu(images), strict=True):
        sure = one.scores > 0.1
        assert abs(int(sure.sum()) - int((other.scores > 0.1).sum())) <= 1
        for box, label in zip(one.boxes[sure], one.labels[sure], strict=True):
            assert (other.boxes[other.labels == label] - box).abs().amax(1).min() < 0.5
    figures = []
    for device in ("cpu", "cuda"):
        path = tmp_path / f"{device}.json"
        files = ["--annotations", str(drawn.val_annotations), "--images", str(drawn.val_images), "--json", str(path)]
        eval_det([str(trained.best_path), *files, "--device", device])
        figures.append(json.loads(path.read_text())["AP"])
    assert figures[0] == pytest.approx(figures[1], abs=2e-3)


def test_full_memory_names_the_settings(
    drawn: DetectionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.cuda.empty_cache()
    memory = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(300e6 / memory)
    large = ("--train.batch-size", "24", "--model.input-size", "512", "512")
    try:
        with pytest.raises(SystemExit) as ended:
            train_det(command(drawn, "litedet", tmp_path / "run", *large))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert ended.value.code == 2
    assert "error: memory is full: lower --train.batch-size (now 24; 12 with" in capsys.readouterr().err


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "detection.cli.train", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = load_checkpoint(run_dir / "last.pt")["weights"]
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ssdlite", "litedet"])
def test_deterministic_runs_are_equal_and_a_killed_one_goes_on(kind: str, drawn: DetectionSet, tmp_path: Path) -> None:
    more = ("--train.epochs", "3", "--train.deterministic", "True", "--train.checkpoint-every-steps", "1")
    names = ("one", "two")
    runs = [start(command(drawn, kind, tmp_path / name, *more)) for name in names]
    killed = command(drawn, kind, tmp_path / "killed", *more)
    process = start(killed)
    end = time.monotonic() + 240
    while not (tmp_path / "killed" / "last.pt").exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()  # its data workers end when they see that it is gone
    runs.append(start([*killed, "--train.resume", "True"]))
    for run in runs:
        said = run.communicate(timeout=240)[0]
        assert run.returncode == 0, said
        assert "going on after batch" in said or run is not runs[2]
    first, second, resumed = (weights_of(tmp_path / name) for name in (*names, "killed"))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_a_compiled_training_is_the_same(drawn: DetectionSet, tmp_path: Path) -> None:
    """Both draw the same batches; what is left is the order of sums."""
    losses = []
    for compiled in ("False", "True"):
        run = start(command(drawn, "litedet", tmp_path / compiled, "--train.epochs", "1", "--train.compile", compiled))
        said = run.communicate(timeout=400)[0]
        assert run.returncode == 0, said
        losses.append(json.loads((tmp_path / compiled / "metrics.jsonl").read_text())["losses"]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_a_classifier_trains(tmp_path: Path) -> None:
    train, val = draw_classification_set(tmp_path / "drawn", num_train=8, num_val=2, size=(48, 48))
    run_dir = tmp_path / "run"
    train_cls(
        [
            *(f"{ROOT}/configs/finetune.py:classifier", "--data.train", str(train), "--data.val", str(val)),
            *("--run-dir", str(run_dir), "--model.backbone.width", "0.35", "--transform.size", "32"),
            *("--transform.eval-size", "32", "--data.workers", "2", "--train.epochs", "2", "--train.batch-size", "8"),
            *("--train.amp", "bf16", "--model.backbone.frozen-stages", "0"),
        ]
    )
    assert (run_dir / "backbone.safetensors").is_file()


def test_batches_come_from_page_locked_memory(drawn: DetectionSet) -> None:
    dataset = DetectionDataset(CocoIndex.read(drawn.val_annotations), drawn.val_images, EvalTransform((128, 128)))
    for num_workers in (0, 1):
        loader = build_loader(dataset, batch_size=4, num_workers=num_workers, pin_memory=True)
        batch = next(iter(loader))
        assert all(tensor.is_pinned() for tensor in batch.inputs())
