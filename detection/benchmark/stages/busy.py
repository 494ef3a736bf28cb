"""Beside a process that keeps a core busy: what the waiting of OpenMP's threads costs on a machine that is shared.

Threads that have nothing to do wait in a loop before they sleep, and where another process has their core, the others wait for
them. ``import detection`` shortens the loop (GOMP_SPINCOUNT) unless the user has set it; the peer is the same code with the
default of GNU's OpenMP, which torch has on Linux. Where torch has another OpenMP both sides are the same.
"""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detection.benchmark.apart import Side, run_apart
from detection.benchmark.inputs import Inputs
from detection.benchmark.stages.train import own_step, training_arguments
from detection.benchmark.timing import Comparison, compare, interleave
from detection.inference.predictor import Predictor
from detection.inference.runners import build_runner
from detection.models.build import build_detector
from detection.weights.info import DetectorInfo

# libgomp's own value where neither variable is set; set, so that importing detection leaves it alone.
_DEFAULT = {"GOMP_SPINCOUNT": "300000", "OMP_WAIT_POLICY": None}
_PEER = "torch's default waiting"


def busy(inputs: Inputs) -> Iterator[Comparison]:
    """A prediction and a training step, each beside a process that computes without end."""
    prediction = (inputs.info, inputs.model.state_dict(), inputs.images[0], inputs.config.threads)
    for name, build, arguments, rounds in (
        ("predict, busy machine", _prediction, prediction, inputs.config.rounds),
        ("training step, busy machine", own_step, training_arguments(inputs), max(inputs.config.rounds // 3, 2)),
    ):
        sides = {"ours": Side(build, arguments), "default": Side(build, arguments, _DEFAULT)}
        with run_apart(sides) as calls, _another_process():
            times = interleave(calls, rounds, warm_up=2)
        yield compare(name, _PEER, times["ours"], times["default"], bar=None)


@contextmanager
def _prediction(
    info: DetectorInfo, weights: dict[str, Tensor], image: NDArray[np.uint8], threads: int
) -> Iterator[Callable[[], object]]:
    torch.set_num_threads(threads)
    model = build_detector(info.model, len(info.class_names))
    model.load_state_dict(weights)
    predictor = Predictor(build_runner(model, "torch", torch.device("cpu")), info)
    yield lambda: predictor(image)


@contextmanager
def _another_process() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_compute, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _compute() -> None:
    while True:
        pass
