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
from test_processes import DYING, EACH_STEP, command
from together import ROOT

from detection.data.drawn import draw_detection_set

pytestmark = pytest.mark.slow


def network(*commands: str) -> None:
    for line in commands:
        done = subprocess.run(["ip", *line.split()], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"no network namespaces can be made here (ip {line}: {done.stderr.strip()})")


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


def test_two_nodes_train_and_go_on_when_a_process_of_one_was_killed(
    nodes: list[tuple[str, str]], tmp_path: Path
) -> None:
    """The node of process 0, which opens the run folder, has not had a failure of its own and counts no restart."""
    draw_detection_set(tmp_path, 18, 3, (96, 96), 0)
    script = tmp_path / "dying.py"
    script.write_text(DYING)
    processes = []
    for place, (name, address) in enumerate(nodes):
        start = [
            *("ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"),
            *("--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{nodes[0][1]}:29500"),
            # both have one host name, by which torchrun looks for the node that keeps the store
            *("--rdzv-conf", f"is_host={1 - place}", "--rdzv-id", "two-nodes", "--local-addr", address),
            *("--max-restarts", "1", str(script)),
        ]
        environment = {
            "GLOO_SOCKET_IFNAME": name,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT}/tests",
        }
        processes.append(
            subprocess.Popen(
                [*start, *command(tmp_path, "ssdlite", "two", *EACH_STEP)],
                env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "going on after batch 1 of epoch 2" in "".join(said)
    records = [json.loads(line) for line in (tmp_path / "two_ssdlite" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [3, 6]
