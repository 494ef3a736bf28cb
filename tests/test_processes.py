"""Several processes on one machine train as one does, and go on when one of them was killed or their number changes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small
import torch
import torch._dynamo  # by DDP
from test_trainer import assert_same_run, losses_of
from together import ROOT, compute_in_double, run_together

from detection.cli import train
from detection.data.drawn import draw_detection_set
from detection.engine import loop
from detection.engine.checkpoint import load_checkpoint
from detection.training import run_report, task

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform == "win32", reason="fork and POSIX signals")]

KINDS = ("ssdlite", "litedet")
STOPPED = "stopped"


# Process 1 of the first start is killed before the checkpoint of step 5 is written.
DYING = """
import os, signal
from together import compute_in_double
compute_in_double()
from detection.cli.train import main
from detection.engine import loop
update = loop._Loop._update
def dies(self, meter):
    update(self, meter)
    if self.state.step == 5 and self.runtime.rank == 1 and not self.runtime.repeats:
        os.kill(os.getpid(), signal.SIGKILL)
loop._Loop._update = dies
main()
"""


EACH_STEP = ("--train.checkpoint-every-steps", "1")


def command(folder: Path, kind: str, name: str, *more: str) -> list[str]:
    return [
        f"{ROOT}/configs/finetune.py:{kind}",
        *("--data.train.annotations", f"{folder}/train.json", "--data.train.images", f"{folder}/train"),
        *("--data.val.annotations", f"{folder}/val.json", "--data.val.images", f"{folder}/val"),
        *("--run-dir", f"{folder}/{name}_{kind}", "--data.workers", "0", "--model.input-size", "96", "96"),
        *(small.SSDLITE_FLAGS if kind == "ssdlite" else small.BACKBONE_FLAGS),
        *("--train.device", "cpu"),
        *("--train.epochs", "2", "--train.eval-every", "2", "--train.batch-size", "6", "--train.log-every", "1"),
        *("--train.optim.name", "sgd", "--train.optim.lr", "0.01", "--train.optim.warmup-steps", "2"),
        *more,
    ]


def draw_nothing() -> None:
    """No report and no images in TensorBoard: seconds for each training. Those that torchrun starts draw."""
    run_report.try_run_report = lambda run_dir: None
    task.DetectionTask.log_images = lambda *given: None


def train_one(folder: Path, kind: str, name: str, *more: str) -> None:
    compute_in_double()
    draw_nothing()
    train.main(command(folder, kind, name, *more))


def train_until_a_signal(folder: Path) -> None:
    update = loop._Loop._update

    def stops(self: loop._Loop, *args: object) -> None:
        update(self, *args)
        if self.state.step == 5 and self.runtime.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    compute_in_double()
    draw_nothing()
    loop._Loop._update = stops
    with pytest.raises(SystemExit) as end:
        train.main(command(folder, "ssdlite", STOPPED))
    assert end.value.code in (130, 143)  # the one that got the signal, and the other


def copy_stopped(folder: Path) -> None:
    for name in ("went_on_1", "went_on_3"):
        shutil.copytree(folder / f"{STOPPED}_ssdlite", folder / f"{name}_ssdlite")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run for each number of processes, and what they said."""
    folder = tmp_path_factory.mktemp("processes")
    drawn = draw_detection_set(folder, 18, 3, (96, 96), 0)
    content = json.loads(drawn.train_annotations.read_text())
    having = {image["id"] for image in content["images"][:3]}  # so that some batches have objects in one process alone
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] in having]
    drawn.train_annotations.write_text(json.dumps(content))
    done = run_together(
        [
            *((number, train_one, (folder, kind, str(number))) for number in (1, 2, 3) for kind in KINDS),
            (2, train_until_a_signal, (folder,)),
            (1, copy_stopped, (folder,)),
            *(
                (number, train_one, (folder, "ssdlite", f"went_on_{number}", "--train.resume", "True"))
                for number in (1, 3)
            ),
        ]
    )
    return folder, done.stdout


@pytest.mark.parametrize(
    "name", ["2_ssdlite", "3_ssdlite", "2_litedet", "3_litedet", "went_on_1_ssdlite", "went_on_3_ssdlite"]
)
def test_as_one_process(trained: tuple[Path, str], name: str) -> None:
    folder, _ = trained
    ours, alone = folder / name, folder / f"1_{name.split('_')[-1]}"
    expected = load_checkpoint(alone / "last.pt")
    given = load_checkpoint(ours / "last.pt")
    assert losses_of(ours) == pytest.approx(losses_of(alone), rel=1e-4)
    torch.testing.assert_close(given["training"]["model"], expected["training"]["model"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(given["weights"], expected["weights"], rtol=1e-3, atol=1e-4)
    assert given["training"]["world_size"] == (int(name[0]) if name[0].isdigit() else int(name.split("_")[2]))


def test_another_number_of_processes_is_said(trained: tuple[Path, str]) -> None:
    _, said = trained
    for number in (1, 3):
        assert f"this run had 2 processes and goes on with {number}: the same batches" in said


def test_torchrun_starts_killed_processes_again_and_they_go_on(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = trained
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("--max-restarts", "1", str(script), *command(folder, "ssdlite", "again", *EACH_STEP)),
        ],
        capture_output=True, text=True, check=False, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "going on after batch 1 of epoch 2" in done.stdout
    assert_same_run(folder / "again_ssdlite", folder / "2_ssdlite")
