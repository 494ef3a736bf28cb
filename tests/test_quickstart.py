import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from detection.cli import eval as eval_det
from detection.cli import quickstart, train_cls
from detection.cli import train as train_det
from detection.inference import predictor
from detection.inference.video import FrameReader
from detection.structures import Detections

TOOLS = Path(__file__).resolve().parents[1] / "tools"
SMALL = ["--num-train", "16", "--num-val", "3", "--num-crops", "16", "--num-frames", "5", "--image-side", "64"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The trainings and the evaluation replaced by fakes that note their command lines; the rest is real."""
    calls: dict[str, list[str]] = {}

    def fake(name: str, result: SimpleNamespace):
        def main(argv: list[str]) -> SimpleNamespace:
            calls[name] = argv
            return result

        return main

    def nothing_but_a_star(image: np.ndarray) -> Detections:
        boxes, labels = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.tensor([3])
        return Detections(boxes=boxes, scores=torch.ones(1), labels=labels, class_names=("a", "b", "c", "star"))

    monkeypatch.setattr(train_cls, "main", fake("train_cls", SimpleNamespace()))
    monkeypatch.setattr(train_det, "main", fake("train_det", SimpleNamespace(best_path=Path("some/best.pt"))))
    figures = {"AP": 0.6543219, "AP50": 0.91, "AP75": 0.7}
    monkeypatch.setattr(eval_det, "main", fake("eval_det", SimpleNamespace(figures=figures)))
    monkeypatch.setattr(predictor, "load_detector", lambda *_, **__: nothing_but_a_star)
    return calls


def after(argv: list[str], option: str) -> str:
    return argv[argv.index(option) + 1]


def test_whole_road(tmp_path: Path, calls: dict[str, list[str]], capsys: pytest.CaptureFixture[str]):
    run_dir = tmp_path / "run"
    result = quickstart.main(["--run-dir", str(run_dir), *SMALL])

    assert Path(after(calls["train_cls"], "--data.train")) == run_dir / "data" / "classification" / "train"
    assert calls["train_cls"][0] == "quickstart:classifier"
    assert calls["train_det"][0] == "quickstart:detector"
    # the detector starts from the file that train_cls writes, and is measured on images it did not train on
    assert after(calls["train_det"], "--weights") == str(run_dir / "classifier" / "backbone.safetensors")
    assert after(calls["eval_det"], "--annotations") == str(run_dir / "data" / "detection" / "val.json")
    assert calls["eval_det"][0] == "some/best.pt"
    assert after(calls["train_det"], "--data.train.annotations") != after(calls["eval_det"], "--annotations")

    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["AP"], summary["AP50"]) == (0.6543, 0.91)
    parts = ["data", "classifier", "detector", "evaluation", "images", "video", "total"]
    assert list(summary["seconds"]) == parts
    assert summary["seconds"]["total"] == pytest.approx(sum(list(summary["seconds"].values())[:-1]))
    assert {name: Path(path) for name, path in summary["paths"].items()} == result.paths

    for name in ("video", "video with boxes"):
        with FrameReader(result.paths[name]) as reader:
            assert (reader.num_frames, reader.size, reader.rate) == (5, (128, 128), 25)
    assert len(result.paths["video's detections"].read_text().splitlines()) == 5
    assert cv2.imread(str(result.paths["detections"])).shape[1] == 3 * 480 + 2 * 4  # three images in a row
    single = cv2.imread(str(run_dir / "images" / "detections_0.jpg"))
    assert single.shape == (480, 480, 3)
    printed = capsys.readouterr().out
    assert "AP 0.654, AP50 0.910" in printed
    assert str(run_dir / "video_detections.mp4") in printed


def test_second_run_begins_anew_and_spares_what_is_not_its_own(tmp_path: Path, calls: dict[str, list[str]], capsys):
    run_dir = tmp_path / "run"
    quickstart.main(["--run-dir", str(run_dir), *SMALL])
    (run_dir / "left over").touch()
    quickstart.main(["--run-dir", str(run_dir), *SMALL])
    assert not (run_dir / "left over").exists()
    assert f"removing the earlier run in {run_dir}" in capsys.readouterr().out

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(SystemExit):
        quickstart.main(["--run-dir", str(tmp_path / "mine"), *SMALL])
    assert "no quickstart made it; move it away or choose another --run-dir" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    "wrong", [("--image-side", "8"), ("--crop-side", "3"), ("--seed", "-1"), ("--num-val", "0"), ("--num-train", "15")]
)
def test_an_earlier_run_outlives_parameters_that_cannot_work(tmp_path: Path, wrong: tuple[str, str]):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".quickstart").touch()
    (run_dir / "result").touch()
    with pytest.raises(SystemExit) as ended:
        quickstart.main(["--run-dir", str(run_dir), *SMALL, *wrong])
    assert ended.value.code == 2
    assert (run_dir / "result").exists()


def test_no_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        quickstart.main(["--run-dir", str(tmp_path / "run"), "--num-train", "0"])
    assert "--num-train 0: must be at least 1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def prepare(folder: Path, python: str) -> subprocess.CompletedProcess[str]:
    (folder / "python").write_text(python)
    (folder / "python").chmod(0o755)
    command = f"source '{TOOLS / 'environment.sh'}' && prepare_environment"
    environment = os.environ | {"PYTHON": str(folder / "python")}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


def test_python_too_old_is_one_line(tmp_path: Path):
    ended = prepare(tmp_path, '#!/bin/sh\ncase "$2" in *version_info*) exit 1;; *) echo 3.8.1;; esac\n')
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "error: LiteDet needs Python 3.10 or newer;" in ended.stderr
    assert "python is 3.8.1; install one" in ended.stderr
    assert not (tmp_path / ".venv").exists()


def test_python_without_venv_is_one_line(tmp_path: Path):
    ended = prepare(tmp_path, '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexec python3 "$@"\n')
    assert ended.returncode == 1
    assert ended.stderr.count("\n") == 1
    assert "has no venv module; install it (Debian, Ubuntu: apt install python3." in ended.stderr
