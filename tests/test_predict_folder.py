import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from test_predictor import small_detector

from detection.cli import predict
from detection.inference.folder import list_images
from detection.inference.predictor import load_detector
from detection.weights.native import save_detector

pq = pytest.importorskip("pyarrow.parquet", reason="litedet predict needs pyarrow (pip install 'litedet[predict]')")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    save_detector(root / "d.safetensors", *small_detector())
    (root / "images" / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(23):
        image = rng.integers(0, 256, (40 + number, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(root / "images" / ("sub" if number % 2 else "") / f"{number}.png"), image)
    (root / "images" / "rotten.jpg").write_bytes(b"rotten")
    return root


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    fixed = ["--device", "cpu", "--workers", "0", "--score-threshold", "0.01", "--shard-size", "5", "--batch-size", "4"]
    return [str(folder / "d.safetensors"), "--source", str(folder / "images"), "--out", str(out), *fixed, *more]


def rows(out: Path) -> list[dict]:
    return [row for path in sorted(out.glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_every_image_once_with_what_the_predictor_finds(folder: Path, tmp_path: Path, capsys):
    predict.main(arguments(folder, tmp_path / "out"))
    found = rows(tmp_path / "out")
    assert [row["image"] for row in found] == list_images(str(folder / "images"))
    assert len(found) == 24
    detector = load_detector(folder / "d.safetensors", device="cpu", score_threshold=0.01)
    number = 0
    for row in found:
        if row["image"].endswith("rotten.jpg"):
            assert "rotten.jpg" in row["error"]
            assert row["boxes"] is None
            continue
        expected = detector(row["image"])
        assert row["labels"] == expected.labels.tolist()
        assert row["names"] == expected.names()
        np.testing.assert_allclose(row["scores"], expected.scores, atol=1e-5)
        np.testing.assert_allclose(np.array(row["boxes"]).reshape(-1, 4), expected.boxes, atol=1e-2)
        assert (row["height"], row["width"]) == cv2.imread(row["image"]).shape[:2]
        number += len(expected)
    assert number > 0
    assert "rotten.jpg" in (tmp_path / "out" / "unreadable.txt").read_text()
    assert "24 images, 5 of 5 shards" in capsys.readouterr().out


def test_a_worker_process_gives_the_same_rows(folder: Path, tmp_path: Path):
    for workers in ("0", "1"):
        predict.main(arguments(folder, tmp_path / workers, "--workers", workers))
    found, expected = rows(tmp_path / "1"), rows(tmp_path / "0")
    assert len(found) == 24
    assert found == expected


def test_processes_share_the_shards(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", [1, 3]), ("0", [0, 1, 2, 3, 4])):
        monkeypatch.setenv("RANK", rank)
        predict.main(arguments(folder, tmp_path / "out"))
        assert sorted(int(path.stem[6:]) for path in (tmp_path / "out").glob("*.parquet")) == there
    assert [row["image"] for row in rows(tmp_path / "out")] == list_images(str(folder / "images"))


def test_another_threshold_or_list_in_the_same_folder_is_refused(folder: Path, tmp_path: Path, capsys):
    predict.main(arguments(folder, tmp_path / "out"))
    for more, told in (
        (["--score-threshold", "0.5"], "score_threshold 0.01 -> 0.5"),
        (["--source", str(folder / "images" / "sub" / "*.png")], "images 24 -> 11"),
    ):
        with pytest.raises(SystemExit):
            predict.main(arguments(folder, tmp_path / "out", *more))
        assert told in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "predict.json").read_text())["score_threshold"] == 0.01


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs the signals of Unix")
def test_killed_and_continued_has_every_image_once(folder: Path, tmp_path: Path):
    paths = list_images(str(folder / "images"))
    many = tmp_path / "list.txt"
    links = tmp_path / "links"
    links.mkdir()
    for number in range(200):
        (links / f"{number:03}{Path(paths[number % 24]).suffix}").symlink_to(paths[number % 24])
    many.write_text("".join(f"{path}\n" for path in sorted(links.iterdir())))
    out = tmp_path / "out"
    argv = arguments(folder, out, "--source", str(many))
    code = "import sys; from detection.cli.predict import main; main(sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.glob("shard-*.parquet"))) < 3:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in out.glob("shard-*.parquet")}
    assert 3 <= len(before) < 40
    predict.main(argv)
    assert [row["image"] for row in rows(out)] == sorted(map(str, links.iterdir()))
    assert all(path.stat().st_mtime_ns == written for path, written in before.items())  # nothing was done twice


def test_sources_that_hold_nothing_say_so(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list_images(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no image in it"):
        list_images(str(tmp_path))
