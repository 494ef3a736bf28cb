"""The pages of an evaluation and a training, and the learning rate range test. Run: pytest tests/test_report.py"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, look_at, needs_chromium

from backbones.errors import UserError
from detection import charts
from detection.cli.eval import main as eval_det
from detection.engine.lr_range import LrRange, smooth
from detection.images.decode import read_image
from detection.training.run_report import write_run_report

BOX = [10.0, 10.0, 40.0, 30.0]


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of two images and three detections, one of them right."""
    import cv2

    for number in range(2):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((80, 100, 3), 90 + 60 * number, np.uint8))
    content = {
        "info": {"exif_orientation": "applied"},
        "images": [{"id": i, "file_name": f"{i}.png", "width": 100, "height": 80} for i in range(2)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 1, "bbox": BOX, "area": 1200, "iscrowd": 0} for i in range(2)
        ],
        "categories": [{"id": 1, "name": "<cat>"}, {"id": 2, "name": "dog & co"}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(content))
    found = [(0, 1, BOX, 0.9), (0, 1, [60.0, 40.0, 20.0, 20.0], 0.8), (1, 2, BOX, 0.7)]
    rows = [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in found]
    (tmp_path / "found.json").write_text(json.dumps(rows))
    (tmp_path / "other.json").write_text(json.dumps(rows[:1]))
    truth, folder = str(tmp_path / "truth.json"), str(tmp_path)
    arguments = ["--from-predictions", str(tmp_path / "found.json"), "--annotations", truth, "--images", folder]
    eval_det([*arguments, "--report", str(tmp_path / "out"), "--against", str(tmp_path / "other.json")])
    return tmp_path / "out" / "report.html"


def test_the_page_is_whole_and_closed(page: Path) -> None:
    text = page.read_text()
    assert "&lt;cat&gt;" in text
    assert "<cat>" not in text
    assert not re.search(r"https?://|<script|<link", text)
    assert "nothing there" in text  # the false alarm of 0.8
    assert "right place, wrong class" in text
    assert text.count("data:image/jpeg") == 4  # two false alarms, one miss, one image in which the other differs
    assert "Against" in text
    taken = r"<td>&lt;cat&gt;</td><td>dog &amp; co</td><td class=\"number\">1</td><td class=\"number\">50 %</td>"
    assert re.search(taken, text)  # one of two cats is called a dog


def test_a_page_without_detections(page: Path, tmp_path: Path) -> None:
    (tmp_path / "found.json").write_text("[]")
    truth = str(tmp_path / "truth.json")
    eval_det(
        ["--from-predictions", str(tmp_path / "found.json"), "--annotations", truth, "--report", str(tmp_path / "e")]
    )
    assert "COCO" in (tmp_path / "e" / "report.html").read_text()


@needs_chromium
def test_the_page_fits_a_desk_and_a_telephone(page: Path, tmp_path: Path) -> None:
    desk, telephone = look_at(page, tmp_path)
    assert (desk.width, telephone.width) == (1400, 400)
    for look in (desk, telephone):
        assert not look.scrolls, look
        assert look.loaded == 4
        assert look.letters > 9, look
    assert desk.halves == []


def test_charts() -> None:
    assert "<svg" in charts.line_chart([], "x", "y")
    assert "&lt;a&gt;" in charts.line_chart(
        [("<a>", np.array([0.0, np.nan, 1.0]), np.array([0.0, 0.5, 1.0]))], "x", "y"
    )
    assert "nan" not in charts.line_chart([("a", np.array([np.nan]), np.array([0.5]))], "x", "y", marks=[(np.nan, 0.5)])
    assert "<table" in charts.matrix_table(np.zeros((0, 0), np.int64), [], [])
    cells = re.findall(
        r"rgba\(47,111,222,([\d.]+)\)\">(\d*)</td>", charts.matrix_table(np.array([[3, 1]]), ["a"], ["a", "b"])
    )
    assert [(float(share), text) for share, text in cells] == [(pytest.approx(0.5625, abs=0.01), "3"), (0.19, "1")]


def record(epoch: int, metrics: dict[str, float]) -> str:
    line = {
        "epoch": epoch, "step": 10 * epoch, "lr": {"x1": 0.1}, "losses": {"loss": 1 / epoch, "positives": 3.0},
        "images_per_second": 10.0, "data_wait_share": 0.1, "seconds": 60.0, "metrics": metrics, "best": bool(metrics),
    }  # fmt: skip
    return json.dumps(line) + "\n"


def test_report_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run"):
        write_run_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no epoch"):
        write_run_report(tmp_path)
    lines = record(1, {}) + record(2, {"AP": 0.25, "AP_small": -1.0}) + '{"epoch": 3, "cut'
    (tmp_path / "metrics.jsonl").write_text(lines)
    report, curves = write_run_report(tmp_path)
    text = report.read_text()
    assert "best AP" in text
    assert "0.250" in text
    assert read_image(curves).shape[2] == 3
    assert text.count("<img ") == 5  # losses, validation, rate, positives, waiting
    if CHROMIUM is not None:
        for look in look_at(report, tmp_path):
            assert not look.scrolls, look
            assert look.loaded == 5
            assert look.halves == []


def test_range_test_suggests_a_tenth_of_the_lowest() -> None:
    rates = [10 ** (-6 + 0.05 * i) for i in range(140)]
    losses = [abs(math.log10(rate) + 1) + 1 for rate in rates]  # lowest at 0.1; the average lags behind
    found = LrRange.of(rates, losses, False)
    assert 0.01 <= found.suggestion < 0.03
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2, 2, 2])
    with pytest.raises(UserError, match="finite"):
        LrRange.of([1e-6], [1.0], True)
