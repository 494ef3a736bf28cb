"""tools/train_det.py from drawn images to a detector in use. Run: pytest tests/test_train_det.py"""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import small
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from detection import load_detector
from detection.cli.eval import main as eval_det
from detection.cli.recipes import load_config
from detection.cli.train import main as train_det
from detection.data.drawn import DetectionSet, draw_detection_set
from detection.engine import lr_range
from detection.engine.checkpoint import load_checkpoint
from detection.engine.loop import TrainResult
from detection.engine.runtime import Runtime
from detection.training.task import DetectionTask
from detection.weights.native import read_detector

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> DetectionSet:
    return draw_detection_set(tmp_path_factory.mktemp("drawn"), 24, 8, (128, 128), 0)


def command(drawn: DetectionSet, run_dir: Path, *more: str) -> list[str]:
    return [
        f"{ROOT}/configs/finetune.py:ssdlite",
        *("--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)),
        *("--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)),
        *("--run-dir", str(run_dir), "--data.workers", "0", *small.SSDLITE_FLAGS),
        *("--model.input-size", "128", "128", "--train.batch-size", "8", "--train.device", "cpu"),
        *more,
    ]


@pytest.fixture(scope="module")
def trained(drawn: DetectionSet, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    return train_det(command(drawn, tmp_path_factory.mktemp("run") / "first", "--train.epochs", "2"))


def test_what_a_run_leaves(trained: TrainResult, drawn: DetectionSet) -> None:
    run_dir = trained.best_path.parent
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert json.loads((run_dir / "config.json").read_text())["model"]["input_size"] == [128, 128]
    assert (run_dir / "report.html").read_text().count("data:image/png") > 1
    assert (run_dir / "curves.png").stat().st_size > 10_000
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    tags = events.Tags()
    assert set(tags["images"]) == {"training/targets", "training/predictions", "validation/truth_and_found"}
    assert tags["histograms"] == ["validation/scores"]
    assert {"train/loss", "train/positives_per_object", "val/AP", "speed/data_wait_share"} <= set(tags["scalars"])
    assert any(tag.startswith("lr/") for tag in tags["scalars"])
    assert [event.step for event in events.Scalars("val/AP")] == [3, 6]  # 24 images by 8, two epochs
    assert len(events.Images("validation/truth_and_found")) == 3  # and before the first step
    assert events.Histograms("validation/scores")[-1].histogram_value.max <= 1
    model, info = read_detector(trained.best_path)
    categories = json.loads(drawn.train_annotations.read_text())["categories"]
    assert info.class_names == tuple(category["name"] for category in categories)
    assert info.category_ids == tuple(category["id"] for category in categories)
    assert model.num_classes == len(categories)


def test_learning_rate_range(
    drawn: DetectionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lr_range, "find_lr", partial(lr_range.find_lr, steps=13, high=0.1))
    with pytest.raises(SystemExit) as ended:
        train_det(command(drawn, tmp_path / "run", "--find-lr"))
    assert ended.value.code == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lr_finder.json", "lr_finder.png"}
    found = json.loads((tmp_path / "run" / "lr_finder.json").read_text())
    assert found["rates"][:2] == pytest.approx([1e-6, 1e-6 * 1e5 ** (1 / 12)])
    assert len(found["losses"]) == len(found["rates"]) == (13 if not found["diverged"] else len(found["losses"]))
    assert len(set(found["losses"])) > 5
    assert f"suggestion: --train.optim.lr {found['suggestion']:.2g}" in capsys.readouterr().out


def test_evaluation_of_the_checkpoint_gives_the_figure_of_the_training(
    trained: TrainResult, drawn: DetectionSet, tmp_path: Path
) -> None:
    out = tmp_path / "figures.json"
    figures = eval_det(
        [
            str(trained.best_path),
            *("--annotations", str(drawn.val_annotations), "--images", str(drawn.val_images), "--json", str(out)),
        ]
    ).figures
    assert figures["AP"] == pytest.approx(trained.best_metric, abs=1e-3)
    assert json.loads(out.read_text())["AP50"] == pytest.approx(figures["AP50"])


def test_three_lines_with_the_checkpoint(trained: TrainResult, drawn: DetectionSet) -> None:
    image = next(iter(sorted(drawn.val_images.glob("*.jpg"))))
    found = load_detector(trained.best_path, device="cpu", score_threshold=0.0)(image)
    assert len(found) > 0
    assert set(found.names()) <= set(read_detector(trained.best_path)[1].class_names)


def test_a_checkpoint_of_other_classes_is_taken_up(
    trained: TrainResult,
    drawn: DetectionSet,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = json.loads(drawn.train_annotations.read_text())
    kept = data["categories"][0]["id"]
    data["categories"] = data["categories"][:1]
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == kept]
    one_class = tmp_path / "one.json"
    one_class.write_text(json.dumps(data))
    more = ("--train.epochs", "1", "--weights", str(trained.best_path), "--data.train.annotations", str(one_class))
    with caplog.at_level("INFO"):
        train_det([*command(drawn, tmp_path / "run", *more), "--data.val.annotations", str(one_class),
                   "--data.val.images", str(drawn.train_images)])  # fmt: skip
    assert "the layers that predict classes are new" in caplog.text + capfd.readouterr().out
    assert read_detector(tmp_path / "run" / "best.pt")[0].num_classes == 1


def expect_error(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_det(argv)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said


def test_mistakes_end_in_one_clear_line(
    drawn: DetectionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    recipe = f"{ROOT}/configs/finetune.py:ssdlite"
    expect_error([recipe], "frozen_stages is 3 and there are no weights to start from: random layers", capsys)
    expect_error([recipe, "--weights", "FILE"], "no --data.train.annotations given", capsys)
    expect_error(command(drawn, run, "--weights", "nowhere.pt"), "nowhere.pt does not exist", capsys)
    expect_error(command(drawn, run, "--data.train.annotations", "nowhere.json"), "nowhere.json", capsys)
    expect_error(command(drawn, run, "--data.train.images", str(tmp_path / "empty")), str(tmp_path / "empty"), capsys)
    expect_error(
        command(drawn, run, "--train.batch-size", "100"), "batch size 100 is larger than the 24 images", capsys
    )
    expect_error([f"{ROOT}/configs/imagenet.py:mobilenetv2"], "needs a DetectionConfig", capsys)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect_error([*command(drawn, run), "--train.device", "cuda"], "'cuda' was asked for", capsys)
    assert not run.exists()


def test_a_run_folder_is_not_written_over(
    trained: TrainResult, drawn: DetectionSet, capsys: pytest.CaptureFixture[str]
) -> None:
    before = trained.last_path.read_bytes()
    expect_error(command(drawn, trained.last_path.parent, "--train.epochs", "2"), "--train.resume", capsys)
    assert trained.last_path.read_bytes() == before


def test_validation_data_are_looked_at_before_the_first_step(
    drawn: DetectionSet, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    data = json.loads(drawn.val_annotations.read_text())
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps(data | {"annotations": []}))
    argv = command(drawn, tmp_path / "run")
    expect_error([*argv, "--data.val.annotations", str(empty)], "no ground truth to evaluate on", capsys)

    half = tmp_path / "half"
    half.mkdir()
    for image in sorted(drawn.val_images.iterdir())[:4]:
        shutil.copy(image, half)
    expect_error([*argv, "--data.val.images", str(half)], "4 of 8 validation images cannot be read, more than", capsys)
    assert not (tmp_path / "run").exists()
    assert "epoch" not in caplog.text


def test_a_task_leaves_the_config_alone_and_says_what_it_adopted(trained: TrainResult, drawn: DetectionSet) -> None:
    config = load_config(command(drawn, Path("run"), "--train.amp", "bf16"), "test")
    config.weights, config.model.backbone.width, config.model.score = str(trained.best_path), 1.0, "sigmoid"
    config.loss.classification = "focal"
    before = copy.deepcopy(config)
    task = DetectionTask(config, Runtime(device=torch.device("cpu")))
    assert config == before
    assert (task.config.model.backbone.width, task.config.model.score) == (0.35, "softmax")
    assert task.config.loss.classification == "cross_entropy"

    # The figure of a training in bf16 is that of an evaluation of its checkpoint, which computes in float32.
    seen: list[torch.Tensor] = []
    task.model.backbone.register_forward_hook(lambda module, inputs, output: seen.extend(output.values()))
    task.evaluate(task.model)
    assert {output.dtype for output in seen} == {torch.float32}


def test_a_run_goes_on_from_its_folder_alone(
    trained: TrainResult, drawn: DetectionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    weights = shutil.copy(trained.best_path, tmp_path / "start.pt")
    # the weights decide the width; the first stages stay as they are
    more = ("--train.epochs", "2", "--weights", str(weights), "--model.backbone.width", "1.0",
            "--model.backbone.frozen-stages", "2")  # fmt: skip
    straight = train_det(command(drawn, tmp_path / "straight", *more))

    calls = []
    evaluate = DetectionTask.evaluate

    def stop_at_the_second(task: DetectionTask, model: nn.Module) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(task, model)

    monkeypatch.setattr(DetectionTask, "evaluate", stop_at_the_second)
    run = tmp_path / "moved" / "run"
    with pytest.raises(SystemExit):
        train_det(command(drawn, tmp_path / "run", *more))
    monkeypatch.undo()
    capsys.readouterr()
    (tmp_path / "moved").mkdir()
    (tmp_path / "run").rename(run)
    Path(weights).unlink()
    moved = tmp_path / "moved" / "images"
    shutil.copytree(drawn.train_images, moved)
    assert json.loads((run / "config.json").read_text())["model"]["backbone"]["width"] == 0.35

    expect_error([str(run / "best.pt")], "a run is gone on with from its last.pt", capsys)
    expect_error([str(run), "--train.epochs", "3"], "train.epochs 2 -> 3", capsys)
    expect_error([str(run), "--data.train.annotations", str(drawn.val_annotations)], "other data (images 24", capsys)
    other = train_det(
        [str(run), "--data.train.images", str(moved), "--data.workers", "1", "--data.val-batch-size", "3"]
    )
    assert other.last_path == run / "last.pt"
    ours, theirs = load_checkpoint(other.last_path), load_checkpoint(straight.last_path)
    torch.testing.assert_close(ours["weights"], theirs["weights"], rtol=0, atol=0)
    assert ours["metrics"] == pytest.approx(theirs["metrics"])


@pytest.mark.slow
def test_two_processes_by_torchrun(drawn: DetectionSet, tmp_path: Path) -> None:
    argv = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--standalone",
        f"{ROOT}/tools/train_det.py",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*argv, *command(drawn, tmp_path / "run", "--train.epochs", "1")],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    figures = eval_det(
        [
            str(tmp_path / "run" / "best.pt"),
            "--annotations",
            str(drawn.val_annotations),
            "--images",
            str(drawn.val_images),
        ]
    ).figures
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 1  # one process writes
    assert figures["AP"] == pytest.approx(lines[0]["AP"] if "AP" in lines[0] else lines[0]["metrics"]["AP"], abs=1e-3)


_DYING = """
import os, signal, sys
from detection.cli.train import main
from detection.engine import loop
update = loop._Loop._update
def dies(self, meter):
    update(self, meter)
    if self.state.step == 4 and self.runtime.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
loop._Loop._update = dies
main()
"""


@pytest.mark.slow
def test_a_process_of_two_that_is_killed_ends_the_other_one(drawn: DetectionSet, tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(_DYING)
    more = ["--train.epochs", "2", "--train.checkpoint-every-steps", "1"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(script), *command(drawn, tmp_path / "run", *more)),
        ],
        capture_output=True, text=True, check=False, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] in (3, 4)
