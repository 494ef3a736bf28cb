"""Fine-tuning in eight bits: ranges, moving average, resume, exports with what was learnt. Run: pytest tests/test_quantized.py"""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_export import needs
from test_litedet import small_litedet
from test_predictor import small_detector
from test_train_det import command, drawn, expect_error  # noqa: F401  a fixture

from backbones.errors import UserError
from detection import load_detector
from detection.cli.train import main as train_det
from detection.data.drawn import DetectionSet
from detection.engine.checkpoint import load_checkpoint
from detection.engine.ema import EmaConfig, ExponentialAverage
from detection.export import table
from detection.export.run import ExportJob, export
from detection.inference.exported import Format
from detection.models.detector import Detector
from detection.training.task import DetectionTask
from detection.weights.native import read_detector, save_detector

pytest.importorskip("torchao", reason="needs the package torchao, which is not installed")

from detection.models.quantized import QuantizedDetector


def images_for(model: Detector, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (2, 3, *model.config.input_size), dtype=torch.uint8, generator=generator)


def ranges(model: QuantizedDetector) -> list[torch.Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith(("min_val", "max_val"))]


def test_eight_bits_are_close_and_ranges_follow_training_alone() -> None:
    model, _ = small_litedet()
    quantized = QuantizedDetector(model)
    images = images_for(model)
    quantized.calibrate(images)
    quantized.eval()
    before = ranges(quantized)
    with torch.no_grad():
        expected, found = model(images), quantized(images)
        quantized(255 - images)  # other ranges
    assert all(torch.equal(one, other) for one, other in zip(before, ranges(quantized), strict=True))
    difference = (found.codes - expected.codes).abs().mean()
    assert 0 < difference < 0.1 * expected.codes.std()  # eight bits, and no more
    quantized.train()
    losses = quantized(255 - images)
    (losses.codes.square().mean() + losses.class_logits.square().mean()).backward()
    assert not all(torch.equal(one, other) for one, other in zip(before, ranges(quantized), strict=True))
    gradients = [parameter.grad for parameter in quantized.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_the_moving_average_keeps_ranges_that_fit_its_weights() -> None:
    quantized = QuantizedDetector(small_detector()[0])
    images = images_for(quantized)
    quantized.calibrate(images)
    average = ExponentialAverage(quantized, EmaConfig(), 10)
    quantized.train()
    quantized(255 - images)
    average.update(quantized)  # copies the flag that ranges follow, which the average must not obey
    averaged = average.model
    assert isinstance(averaged, QuantizedDetector)
    before = ranges(averaged)
    with torch.no_grad():
        first = averaged(images)
        averaged(255 - images)
        second = averaged(images)
    assert all(torch.equal(one, other) for one, other in zip(before, ranges(averaged), strict=True))
    assert torch.equal(first.codes, second.codes)
    again = QuantizedDetector(small_detector()[0])
    again.load_state_dict(dict(averaged.state_dict()))  # as from a file, without torch's versions
    with torch.no_grad():
        assert torch.equal(again.eval()(images).codes, first.codes)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in averaged.state_dict().items())


def quantize(drawn: DetectionSet, weights: Path, run_dir: Path, *more: str) -> list[str]:  # noqa: F811
    given = ("--weights", str(weights), "--quantize", "int8", "--train.epochs", "2")
    return command(drawn, run_dir, *given, *more)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped_and_is_exported(
    drawn: DetectionSet,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = train_det(command(drawn, tmp_path / "float", "--train.epochs", "1")).best_path
    whole = train_det(quantize(drawn, first, tmp_path / "whole"))

    seen = []
    evaluate = DetectionTask.evaluate

    def stop_at_the_second(task: DetectionTask, model: torch.nn.Module) -> dict[str, float]:
        seen.append(copy.deepcopy(model.state_dict()))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate(task, model)

    monkeypatch.setattr(DetectionTask, "evaluate", stop_at_the_second)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        train_det(quantize(drawn, first, tmp_path / "stopped"))
    monkeypatch.setattr(DetectionTask, "evaluate", evaluate)
    resumed = train_det([str(tmp_path / "stopped")])
    ends = [load_checkpoint(result.last_path)["weights"] for result in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert [name for name in ends[0] if not torch.equal(ends[0][name], ends[1][name])] == []

    model, info = read_detector(whole.last_path)
    assert isinstance(model, QuantizedDetector)
    assert info.quantize == "int8"
    for to, name in (("onnx", "q.onnx"), ("openvino", "q.xml")):
        check_export(whole.last_path, to, tmp_path / name, drawn.val_images)  # type: ignore[arg-type]
    job = ExportJob(checkpoint=whole.last_path, to="onnx", out=tmp_path / "x.onnx", images=drawn.val_images)
    other = ExportJob(checkpoint=whole.last_path, to="executorch", out=tmp_path / "x.pte", images=drawn.val_images)
    with pytest.raises(UserError, match="which --to executorch does not take; take onnx, openvino"):
        export(other, say=lambda line: None)
    job.int8, job.calibration = True, drawn.train_images
    with pytest.raises(UserError, match="brings its ranges"):
        export(job, say=lambda line: None)
    monkeypatch.setattr(table, "SUFFIXES", {".pt2": "torch"})
    rows = table.export_all(replace(job, int8=False, calibration=None), tmp_path / "all", say=lambda line: None).rows
    assert [row.format for row in rows] == ["torch (checkpoint)", "torch"]
    assert "which --to torch does not take" in rows[1].note
    capsys.readouterr()
    expect_error(quantize(drawn, whole.best_path, tmp_path / "twice"), "was fine-tuned in 8 bits", capsys)


def check_export(checkpoint: Path, to: Format, out: Path, images: Path) -> None:
    try:
        needs(to)
    except pytest.skip.Exception:
        return
    result = export(ExportJob(checkpoint=checkpoint, to=to, out=out, images=images, raw=True), say=lambda line: None)
    assert result.record.precision == "int8"
    assert result.record.variant == "ranges of the training"
    runner, own = load_detector(out).runner, load_detector(checkpoint).runner
    model, _ = read_detector(checkpoint)
    pixels = images_for(model)[:1]
    with torch.inference_mode():
        found, expected = runner(pixels), own(pixels)
    # The same steps and ranges: some numbers fall on the other side of a half.
    assert (found.codes - expected.codes).abs().mean() < 0.05 * expected.codes.std()
    float_size = sum(parameter.numel() for parameter in model.parameters()) * 4
    assert result.chosen.size < 0.8 * float_size  # a shallow network: the graph takes a third of its file


def test_what_cannot_be_fine_tuned_is_refused(
    drawn: DetectionSet,  # noqa: F811
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_detector(tmp_path / "d.safetensors", *small_detector())  # of other classes
    for more, message in (
        ((), "of the same classes"),
        (("--train.amp", "bf16"), "computes in float32"),
        (("--weights-part", "backbone"), "leave --weights-part out"),
    ):
        expect_error(quantize(drawn, tmp_path / "d.safetensors", tmp_path / "run", *more), message, capsys)
    expect_error(command(drawn, tmp_path / "run", "--quantize", "int8"), "fine-tunes a trained detector", capsys)


def test_frozen_stages_stay_frozen() -> None:
    model, _ = small_litedet()
    model.backbone.stem.requires_grad_(False)
    learns = {name: parameter.requires_grad for name, parameter in QuantizedDetector(model).named_parameters()}
    frozen = [name for name, does in learns.items() if not does]
    assert frozen == [f"{QuantizedDetector.PREFIX}backbone.stem.conv.{name}" for name in ("weight", "bias")]
