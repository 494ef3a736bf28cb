"""Two machines, as two network namespaces of this one that see each other through one cable."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from together import ROOT

from detection.data.drawn import draw_detection_set

pytestmark = pytest.mark.slow


def network(*commands: str) -> None:
    for command in commands:
        done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces can be made here (ip {command}: {done.stderr.strip()})")


@pytest.fixture
def nodes() -> Iterator[list[tuple[str, str]]]:
    """(network namespace, address in it) of two nodes."""
    if shutil.which("ip") is None:
        pytest.skip("the command ip is not here (Debian: apt-get install iproute2)")
    number = uuid.uuid4().hex[:6]
    names = [f"ld{number}{letter}" for letter in "ab"]
    made = [(name, f"10.77.0.{place}") for place, name in enumerate(names, 1)]
    try:
        network(*(f"netns add {name}" for name in names), f"link add {names[0]} type veth peer name {names[1]}")
        for name, address in made:
            network(f"link set {name} netns {name}", f"-n {name} addr add {address}/24 dev {name}",
                    f"-n {name} link set {name} up", f"-n {name} link set lo up")  # fmt: skip
        yield made
    finally:
        for name in names:  # the cable goes with its ends
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def test_training_on_two_nodes(nodes: list[tuple[str, str]], tmp_path: Path) -> None:
    drawn = draw_detection_set(tmp_path, 8, 2, (96, 96), 0)
    processes = []
    for name, address in nodes:
        command = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0][1]}:29500"),
            *("--rdzv-id", "two-nodes", "--local-addr", address, "-m", "detection.cli.train"),
            f"{ROOT}/configs/finetune.py:ssdlite",
            *("--data.train.annotations", str(drawn.train_annotations), "--data.train.images", str(drawn.train_images)),
            *("--data.val.annotations", str(drawn.val_annotations), "--data.val.images", str(drawn.val_images)),
            *("--run-dir", f"{tmp_path}/run", "--data.workers", "0", "--model.input-size", "96", "96"),
            *("--model.backbone.width", "0.35", "--model.backbone.frozen-stages", "0", "--train.device", "cpu"),
            *("--train.epochs", "1", "--train.batch-size", "4"),
        ]
        environment = os.environ | {"GLOO_SOCKET_IFNAME": name, "OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    try:
        said = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    (record,) = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(record)["step"] == 2
    assert "best AP" in said[0] + said[1]
