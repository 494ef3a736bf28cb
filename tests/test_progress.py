"""What a training tells: means worked out by hand, lines where there is no terminal, a bar where there is one."""

import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detection.engine import progress
from detection.engine.log import Meter, Reading, RunLog, describe, epoch_record, with_wait
from detection.engine.runtime import Runtime

CPU = Runtime(device=torch.device("cpu"))


def reading_of(loss: float, *, num_batches: int = 1, seconds: float = 2.0) -> Reading:
    return Reading(
        losses={"loss": loss, "box": loss / 4},
        num_batches=num_batches,
        num_images=24 * num_batches,
        seconds=seconds,
        wait_seconds=0.5,
    )


def test_waiting_is_measured() -> None:
    assert list(with_wait([])) == []

    def slow():  # type: ignore[no-untyped-def]
        yield "a"
        time.sleep(0.05)
        yield "b"

    (first, first_wait), (second, second_wait) = with_wait(slow())
    assert (first, second) == ("a", "b")
    assert first_wait < 0.04 < second_wait


def test_meter_reads_means_and_starts_again() -> None:
    meter = Meter(CPU)
    meter.add({"loss": torch.tensor(1.0), "box": torch.tensor(0.5)}, num_images=4, wait_seconds=0.25)
    meter.add({"loss": torch.tensor(2.0), "box": torch.tensor(1.5)}, num_images=2, wait_seconds=0.5)
    reading = meter.read()
    assert reading.losses == {"loss": 1.5, "box": 1.0}
    assert (reading.num_batches, reading.num_images, reading.wait_seconds) == (2, 6, 0.75)
    assert reading.seconds > 0

    meter.add({"loss": torch.tensor(7.0), "box": torch.tensor(0.0)}, num_images=4, wait_seconds=0.0)
    reading = meter.read()
    assert reading.losses == {"loss": 7.0, "box": 0.0}
    assert (reading.num_batches, reading.num_images, reading.wait_seconds) == (1, 4, 0.0)


def test_meter_keeps_no_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    meter = Meter(CPU)
    meter.add({"loss": (weight * 2).to(torch.bfloat16)}, num_images=1, wait_seconds=0.0)
    assert meter._sums is not None
    assert not meter._sums.requires_grad
    assert meter._sums.dtype == torch.float32


def test_windows_weigh_by_their_batches() -> None:
    mean = Reading.mean([reading_of(1.0, num_batches=3, seconds=2.0), reading_of(5.0, num_batches=1, seconds=6.0)])
    assert mean.losses == {"loss": 2.0, "box": 0.5}  # (3 * 1 + 1 * 5) / 4
    assert (mean.num_batches, mean.num_images, mean.seconds, mean.wait_seconds) == (4, 96, 8.0, 1.0)
    assert mean.images_per_second == 12.0
    assert mean.wait_share == 0.125


def test_description() -> None:
    assert describe(reading_of(2.0)) == "loss 2.000 (box 0.500), 12.0 images/s, 25 % waiting for data"
    alone = Reading(losses={"loss": 1.0}, num_batches=1, num_images=1, seconds=1.0, wait_seconds=0.0)
    assert describe(alone) == "loss 1.000, 1.0 images/s, 0 % waiting for data"


def record_of(epoch: int) -> dict[str, Any]:
    metrics = {"AP": 0.5} if epoch == 2 else {}
    return epoch_record(epoch, 10 * epoch, reading_of(2.0), {"x1": 0.1}, metrics, is_best=bool(metrics), seconds=3.0)


def write_epoch(run_dir: Path, *, runtime: Runtime = CPU, first_epoch: int = 0) -> None:
    history = [record_of(epoch + 1) for epoch in range(first_epoch)]
    with RunLog(run_dir, runtime, 2, 20, 10 * first_epoch, history, 10 * first_epoch) as run_log:
        for epoch in range(first_epoch, 2):
            run_log.start_epoch(epoch, 10)
            for _ in range(10):
                run_log.advance()
            run_log.window(epoch, 10 * (epoch + 1), reading_of(2.0), {"x1": 0.1})
            run_log.evaluation(record_of(epoch + 1)["metrics"], 10 * (epoch + 1))
            run_log.end_epoch(record_of(epoch + 1), reading_of(2.0), shown_metric="AP")


def test_a_line_per_epoch_where_there_is_no_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        write_epoch(tmp_path)
    first, second = caplog.messages
    assert first.startswith("epoch 1/2: loss 2.000 (box 0.500), 12.0 images/s, 25 % waiting for data, 3.0 s, 0:00:0")
    assert first.endswith(" left")
    assert second.endswith("25 % waiting for data, AP 0.5000 (best), 3.0 s")
    assert capsys.readouterr().err == ""


def test_lines_within_an_epoch_that_takes_long(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO):
        write_epoch(tmp_path)
    assert len(caplog.messages) == 4
    assert caplog.messages[0].startswith("epoch 1/2, step 10/20: loss 2.000")


def test_a_bar_where_there_is_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    write_epoch(tmp_path)
    shown = terminal.getvalue()
    assert "epoch 1/2:" in shown
    assert "loss 2.000 (box 0.500), 12.0 images/s, 25 % waiting for data, 0:00:0" in shown


def test_record_and_curves(tmp_path: Path) -> None:
    write_epoch(tmp_path)
    first, second = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == {
        "epoch": 1,
        "step": 10,
        "lr": {"x1": 0.1},
        "losses": {"loss": 2.0, "box": 0.5},
        "images_per_second": 12.0,
        "data_wait_share": 0.25,
        "seconds": 3.0,
        "metrics": {},
        "best": False,
    }
    assert (second["epoch"], second["metrics"], second["best"]) == (2, {"AP": 0.5}, True)

    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(curves.Tags()["scalars"]) == {
        "train/loss",
        "train/box",
        "lr/x1",
        "speed/images_per_second",
        "speed/data_wait_share",
        "val/AP",
    }
    assert [(event.step, event.value) for event in curves.Scalars("train/loss")] == [(10, 2.0), (20, 2.0)]


def test_resumed_record_goes_on(tmp_path: Path) -> None:
    write_epoch(tmp_path)
    write_epoch(tmp_path, first_epoch=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2]


def test_other_processes_write_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        write_epoch(tmp_path, runtime=Runtime(device=torch.device("cpu"), rank=1, world_size=2))
    assert not list(tmp_path.iterdir())
    assert caplog.messages == []


def bar_of(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(progress.progress_bar(range(4), desc="images", unit="image", **options)) == [0, 1, 2, 3]
    return stream.getvalue()


def test_a_pipe_gets_nothing_of_what_is_soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bar_of(io.StringIO(), monkeypatch) == ""
    assert list(progress.progress_bar([], desc="images", unit="image")) == []


def test_a_pipe_gets_whole_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 1e-9)
    shown = bar_of(io.StringIO(), monkeypatch)
    assert "\r" not in shown
    assert [line.split("[")[0] for line in shown.splitlines()] == [
        "images:  25% 1/4 ", "images:  50% 2/4 ", "images:  75% 3/4 ", "images: 100% 4/4 ", "images: 100% 4/4 ",
    ]  # fmt: skip
    assert bar_of(io.StringIO(), monkeypatch, lines=False) == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    shown = bar_of(terminal, monkeypatch)
    assert shown.startswith("\rimages:   0%|")
    assert "4/4" in shown


def test_no_stderr_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.progress_bar([1], desc="images", unit="image")) == [1]
