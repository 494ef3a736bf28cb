"""The soak of tests/soak.py, short: nothing grows in some seconds, and what grows is found."""

import json
import sys
from pathlib import Path

import pytest
from soak import Sample, growth, soak, watch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc")


def samples(**series: list[float]) -> list[Sample]:
    fixed = {"mib": 500.0, "workers_mib": 900.0, "files": 20, "threads": 4}
    return [
        Sample(seconds=number, **{name: series[name][number] if name in series else fixed[name] for name in fixed})
        for number in range(100)
    ]


def test_growth_by_hand() -> None:
    assert growth([]) == ["0 samples are too few to tell"]
    assert growth(samples()) == []
    assert growth(samples(mib=[100.0] * 25 + [500.0] * 75)) == [], "the first quarter is the warm-up"
    assert growth(samples(mib=[400.0 + number % 7 * 20 for number in range(100)])) == [], "up and down"
    assert growth(samples(mib=[400.0 + number for number in range(100)])) == ["MiB of memory: 437 -> 487"]
    assert growth(samples(workers_mib=[900.0 + 2 * number for number in range(100)])) == [
        "MiB of memory of the workers: 974 -> 1074"
    ]
    assert growth(samples(files=[20 + number // 10 for number in range(100)])) == ["open files: 22 -> 27"]
    assert growth(samples(threads=[4 + number // 10 for number in range(100)])) == ["threads: 6 -> 11"]
    assert growth(samples(files=[120 + 7 * (number % 9) * (number > 50) for number in range(100)])) == [], (
        "fuller queues"
    )
    assert growth(samples(files=[120 + 7 * (number % 9) + number // 10 for number in range(100)])) == [
        "open files: 122 -> 128"
    ]


def test_a_process_that_leaks_is_found(tmp_path: Path) -> None:
    code = """
import time
kept = []
while True:
    kept.append(bytearray(b"x" * 2_000_000))
    kept.append(open("/proc/self/stat"))
    time.sleep(0.02)
"""
    found = growth(watch([sys.executable, "-c", code], tmp_path / "log", iter(range(1, 1000)).__next__, 3 / 60))
    assert [text.split(":")[0] for text in found] == ["MiB of memory", "open files"]


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)ended by itself with status 1; .*no such data"):
        watch([sys.executable, "-c", "raise SystemExit('no such data')"], tmp_path / "log", lambda: 0, 1)


@pytest.mark.slow
def test_some_seconds_of_training_and_of_video(tmp_path: Path) -> None:
    assert soak(tmp_path, 0.15) == []
    assert (tmp_path / "soak.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "soak.json").read_text())
    assert {len(content[name]) > 20 for name in ("training", "video")} == {True}
    assert all(one["workers_mib"] > 100 for one in content["training"][-10:]), "its workers are seen"
