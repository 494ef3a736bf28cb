"""Many image files to detections: ``litedet predict`` against the loop that one writes with torchvision."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from detection.benchmark.apart import Side, run_apart
from detection.benchmark.config import Backend
from detection.benchmark.inputs import Inputs
from detection.benchmark.peer import build_peer
from detection.benchmark.timing import Comparison, compare, interleave
from detection.engine.runtime import keep_freed_memory
from detection.inference.folder import Images, Shards, predict_shards
from detection.inference.predictor import Predictor
from detection.inference.runners import build_runner
from detection.models.ssdlite import SSDLite
from detection.weights.info import DetectorInfo

_BATCH, _WORKERS, _SCORE = 32, 2, 0.25  # those that ``litedet predict`` takes unless it is told otherwise


def folder(inputs: Inputs) -> Iterator[Comparison]:
    """JPEG files -> detections, milliseconds an image, by backend; the bar is for the fastest.

    Ours starts its workers anew in each run and writes Parquet; the loop keeps a list. Both have the same weights and input
    size. The loop has torchvision's own score threshold and leaves out what is below ours afterwards, as one does.
    """
    backends: list[Backend] = ["torch", *(one for one in inputs.config.backends if one not in ("torch", "compile"))]
    paths, weights = _links(inputs), inputs.model.state_dict()
    given = (inputs.info, weights, paths, inputs.config.threads)
    sides = {"peer": Side(_loop, given)} | {backend: Side(_predict, (*given, backend)) for backend in backends}
    with run_apart(sides) as calls:
        times = interleave(calls, max(inputs.config.rounds // 3, 1))
    per_image = {name: [run / len(paths) for run in runs] for name, runs in times.items()}
    compared = [
        compare(f"folder of JPEG files, {backend}", "torchvision loop", per_image[backend], per_image["peer"], bar=None)
        for backend in backends
    ]
    min(compared, key=lambda one: one.ratio).bar = 1 / 3
    inputs.notes.append(f"folder: {len(paths)} files, {_WORKERS} workers, batches of {_BATCH}, threshold {_SCORE}")
    yield from compared


def _links(inputs: Inputs) -> list[str]:
    """As many files as were asked for: links to the images, in a folder of the cache."""
    names = [inputs.index.file_name(position) for position in range(len(inputs.index))]
    target = inputs.config.cache / "folder"
    target.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(inputs.config.folder_images):
        source = (inputs.folder / names[number % len(names)]).resolve()
        path = target / f"{number:06}{source.suffix}"
        path.unlink(missing_ok=True)
        path.symlink_to(source)
        paths.append(str(path))
    return paths


def _network(info: DetectorInfo, weights: dict[str, Tensor], threads: int) -> SSDLite:
    torch.set_num_threads(threads)
    model = SSDLite(info.model, len(info.class_names))  # type: ignore[arg-type]
    model.load_state_dict(weights)
    return model.eval()


@contextmanager
def _predict(
    info: DetectorInfo, weights: dict[str, Tensor], paths: Sequence[str], threads: int, backend: Backend
) -> Iterator[Callable[[], object]]:
    multiprocessing.set_start_method(
        None, force=True
    )  # as in the command's process; a spawned one would spawn its workers
    keep_freed_memory()
    runner = build_runner(_network(info, weights, threads), backend, torch.device("cpu"))
    ours = Predictor(runner, replace(info, postprocess=replace(info.postprocess, score_threshold=_SCORE)))

    def run() -> None:
        with tempfile.TemporaryDirectory() as out:
            shards = Shards(paths=paths, out=Path(out), size=1000)
            for _ in predict_shards(ours, shards, Images(paths, info.model), batch_size=_BATCH, workers=_WORKERS):
                pass
            if len(os.listdir(out)) != len(shards):
                raise RuntimeError(f"{len(os.listdir(out))} of {len(shards)} shards are there")

    yield run


@contextmanager
def _loop(
    info: DetectorInfo, weights: dict[str, Tensor], paths: Sequence[str], threads: int
) -> Iterator[Callable[[], object]]:
    peer = build_peer(_network(info, weights, threads), info.postprocess)

    def run() -> None:
        found = []
        with torch.inference_mode():
            for path in paths:
                image = decode_image(path, mode=ImageReadMode.RGB).float() / 255
                (one,) = peer([image])  # it resizes and normalises
                good = one["scores"] > _SCORE
                found.append({name: value[good] for name, value in one.items()})

    yield run
