"""From files to training samples, and opening annotations."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from detection.benchmark import drawn
from detection.benchmark.config import BenchmarkConfig
from detection.benchmark.inputs import Inputs
from detection.benchmark.peer import build_peer_loader
from detection.benchmark.timing import Comparison, compare, interleave
from detection.data.loader import build_loader


def loader(inputs: Inputs) -> Iterator[Comparison]:
    """JPEG files -> augmented batches, one worker, SSD's augmentation against the ssdlite preset of the references.

    Torchvision's batch holds images of their own size: its network resizes them, and that time is not counted here.
    """
    ours = build_loader(inputs.training_set(), batch_size=inputs.config.batch_size, num_workers=1)
    theirs = build_peer_loader(inputs.index, inputs.folder, inputs.config.batch_size, num_workers=1)

    def drain(batches: Any) -> Callable[[], None]:
        def run() -> None:
            for _ in batches:
                pass

        return run

    times = interleave({"ours": drain(ours), "peer": drain(theirs)}, max(inputs.config.rounds // 3, 2))
    images = len(ours) * inputs.config.batch_size
    per_image = {name: [run / images for run in runs] for name, runs in times.items()}
    yield compare("loading an image, 1 worker", "torchvision", per_image["ours"], per_image["peer"], bar=0.50)


def open_annotations(inputs: Inputs) -> Iterator[Comparison]:
    """Opening a COCO json, each time in a process of its own: seconds, and megabytes above those of the imports."""
    config = inputs.config
    path = config.cache / f"open_{config.open_images}_{config.open_boxes}.json"
    if not path.is_file():
        print(f"drawing {path} ...", flush=True)
        drawn.draw_annotations(path, config.open_images, config.open_boxes)
    first, second, peer = [], [], []
    for _ in range(min(5, config.rounds)):
        shutil.rmtree(config.cache / "index", ignore_errors=True)
        first.append(_open_apart("ours", path, config))
        second.append(_open_apart("ours", path, config))
        peer.append(_open_apart("pycocotools", path, config))
    seconds = [run["seconds"] for run in peer]
    yield compare("opening annotations", "pycocotools", [r["seconds"] for r in first], seconds, bar=0.12, unit="s")
    yield compare(
        "  peak memory",
        "pycocotools",
        [r["megabytes"] for r in first],
        [r["megabytes"] for r in peer],
        bar=0.45,
        unit="MB",
    )
    yield compare("  second opening", "pycocotools", [r["seconds"] for r in second], seconds, bar=0.03, unit="s")


_OPEN = """
import json, sys, time
from pathlib import Path
{imports}

def peak():  # not ru_maxrss: a child inherits that of its parent
    status = Path("/proc/self/status")
    if not status.is_file():
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024

before, start = peak(), time.perf_counter()
opened = {call}
seconds = time.perf_counter() - start
print(json.dumps({{"seconds": seconds, "megabytes": peak() - before}}))
"""
_OPENERS = {
    "ours": ("from detection.data.coco import CocoIndex", "CocoIndex.read(sys.argv[1])"),
    "pycocotools": ("from pycocotools.coco import COCO", "COCO(sys.argv[1])"),
}


def _open_apart(side: str, path: Path, config: BenchmarkConfig) -> dict[str, float]:
    imports, call = _OPENERS[side]
    environment = dict(os.environ, XDG_CACHE_HOME=str(config.cache / "index"), OMP_NUM_THREADS=str(config.threads))
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[3]), os.environ.get("PYTHONPATH", "")]
    )
    command = [sys.executable, "-c", _OPEN.format(imports=imports, call=call), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured
