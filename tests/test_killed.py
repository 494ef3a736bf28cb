"""Trainings that are killed as processes: with kill -9 at random moments, and by a signal that they may answer.

A training of a tiny network is killed and resumed again and again, and must end with the bits of one that was not; so
must one with another number of data workers, or with workers that are slow by turns.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small
from test_trainer import assert_same_run

from detection.data.drawn import draw_classification_set, draw_detection_set

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")

ROOT = Path(__file__).resolve().parents[1]
COMMON = [
    *("--train.epochs", "2", "--train.batch-size", "4", "--train.device", "cpu", "--train.num-threads", "1"),
    *("--train.log-every", "3", "--train.checkpoint-every-steps", "2"),
    *small.BACKBONE_FLAGS,
]

# A server that has loaded torch forks a training for each line it reads, so that a start takes no five seconds.
# "slow-" before the command makes each batch of a data worker take a random time.
_SERVER = """
import os, random, sys, time
sys.path.insert(0, {root!r})
import torch, detection.cli.train, detection.cli.train_cls
from detection.training.task import DetectionTask
from detection.classification.task import ClassificationTask
from detection.engine.workers import _SharingCollate
torch.set_num_threads(1)
make = _SharingCollate.__call__
def make_slowly(self, samples):
    time.sleep(random.SystemRandom().random() * 0.2)
    return make(self, samples)
for line in sys.stdin:
    command, *arguments = eval(line)
    child = os.fork()
    if child == 0:
        if command.startswith("slow-"):
            _SharingCollate.__call__ = make_slowly
        main = detection.cli.train.main if command.endswith("train") else detection.cli.train_cls.main
        try:
            main(arguments)
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
        os._exit(0)
    print("started", child, flush=True)
    _, status = os.waitpid(child, 0)
    print("ended", os.waitstatus_to_exitcode(status), flush=True)
"""


class Starter:
    """Starts trainings one after another, each in a process of its own."""

    def __init__(self, log: Path) -> None:
        self.log = log
        with log.open("w") as errors:
            self._server = subprocess.Popen(
                [sys.executable, "-c", _SERVER.format(root=str(ROOT))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            )  # fmt: skip

    def start(self, command: list[str]) -> int:
        """The process number of a new training."""
        self._server.stdin.write(f"{command!r}\n")
        self._server.stdin.flush()
        return int(self._answer("started"))

    def wait(self) -> int:
        """The exit status of the training, minus the number of the signal that ended it."""
        return int(self._answer("ended"))

    def close(self) -> None:
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(60)

    def _answer(self, kind: str) -> str:
        for line in self._server.stdout:  # between the lines of the training itself
            if line.startswith(f"{kind} "):
                return line.split()[1]
        raise AssertionError(self.log.read_text()[-3000:])


def detector_command(folder: Path) -> list[str]:
    drawn = draw_detection_set(folder, 16, 4, (96, 96), 0)
    return [
        "train",
        f"{ROOT}/configs/finetune.py:ssdlite",
        *("--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)),
        *("--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)),
        *("--model.input-size", "96", "96", "--data.workers", "1"),
        *COMMON,
    ]


def classifier_command(folder: Path) -> list[str]:
    train, val = draw_classification_set(folder, num_train=4, num_val=1, size=(48, 48))
    return [
        "train-cls",
        f"{ROOT}/configs/finetune.py:classifier",
        *("--data.train", str(train), "--data.val", str(val), "--transform.size", "32", "--transform.eval-size", "32"),
        *("--data.workers", "0", "--model.dropout", "0.5"),
        *COMMON,
    ]


def unfinished(run_dir: Path) -> set[Path]:
    """The checkpoints that a process is writing, or was killed in writing."""
    return set(run_dir.glob("last.pt.*.part"))


def wait_for_step(run_dir: Path, pid: int, moment: random.Random) -> None:
    """Until the run writes a checkpoint (four of ten times), or has written one, and a random moment more."""
    path = run_dir / "last.pt"
    before = path.stat().st_mtime_ns if path.exists() else 0
    end = time.monotonic() + 120
    in_writing, left = moment.random() < 0.4, unfinished(run_dir)
    while time.monotonic() < end:
        if in_writing and unfinished(run_dir) - left:
            return
        if path.exists() and path.stat().st_mtime_ns != before:
            time.sleep(moment.random() * 0.1)
            return
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.0005)


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    one = Starter(tmp_path_factory.mktemp("server") / "log")
    yield one
    one.close()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, starter: Starter) -> dict[str, tuple[list[str], Path]]:
    """For each kind of training its command, and the folder of a run that was not stopped."""
    runs = {}
    for name, make in (("detector", detector_command), ("classifier", classifier_command)):
        folder = tmp_path_factory.mktemp(name)
        command = make(folder / "drawn")
        starter.start([*command, "--run-dir", str(folder / "run")])
        assert starter.wait() == 0, starter.log.read_text()[-3000:]
        runs[name] = (command, folder / "run")
    return runs


@pytest.mark.slow
@pytest.mark.parametrize(("name", "num_kills"), [("detector", 12), ("classifier", 8)])
def test_killed_with_9_again_and_again(
    tmp_path: Path, starter: Starter, straight: dict[str, tuple[list[str], Path]], name: str, num_kills: int
) -> None:
    (command, expected), moment = straight[name], random.Random(3)
    kills, in_writing = 0, 0
    for attempt in range(num_kills):  # a run that comes to its end is compared, and the next one is begun
        run_dir = tmp_path / f"run_{attempt}"
        while True:
            resume = ["--train.resume", "True"] if (run_dir / "last.pt").exists() else []
            pid = starter.start([*command, "--run-dir", str(run_dir), *resume])
            if kills < num_kills:
                if moment.random() < 0.2:
                    time.sleep(moment.random())  # in starting too
                else:
                    wait_for_step(run_dir, pid, moment)
                with contextlib.suppress(ProcessLookupError):  # it was quicker
                    os.kill(pid, signal.SIGKILL)
            status = starter.wait()
            if status == 0:
                break
            assert status == -signal.SIGKILL, starter.log.read_text()[-3000:]
            kills += 1
            in_writing += bool(unfinished(run_dir))
        assert_same_run(run_dir, expected)
        assert not unfinished(run_dir)
        if kills == num_kills:
            break
    print(f"{kills} kills in {attempt + 1} runs, {in_writing} of them while a checkpoint was written")
    assert kills == num_kills


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_to_the_command(
    tmp_path: Path, starter: Starter, straight: dict[str, tuple[list[str], Path]], number: int, status: int
) -> None:
    command, expected = straight["detector"]
    pid = starter.start([*command, "--run-dir", str(tmp_path / "run")])
    wait_for_step(tmp_path / "run", pid, random.Random(1))
    os.kill(pid, number)
    assert starter.wait() == status, starter.log.read_text()[-3000:]
    assert "--train.resume True" in starter.log.read_text()
    starter.start([*command, "--run-dir", str(tmp_path / "run"), "--train.resume", "True"])
    assert starter.wait() == 0, starter.log.read_text()[-3000:]
    assert_same_run(tmp_path / "run", expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers", "slow"),
    [("detector", "0", ""), ("detector", "4", "slow-"), ("classifier", "1", ""), ("classifier", "4", "slow-")],
)
def test_the_number_and_the_speed_of_workers_change_no_bit(
    tmp_path: Path, starter: Starter, straight: dict[str, tuple[list[str], Path]], name: str, workers: str, slow: str
) -> None:
    (command, *arguments), expected = straight[name]  # the detector's with 1 worker, the classifier's with none
    starter.start([slow + command, *arguments, "--run-dir", str(tmp_path / "run"), "--data.workers", workers])
    assert starter.wait() == 0, starter.log.read_text()[-3000:]
    assert_same_run(tmp_path / "run", expected)
