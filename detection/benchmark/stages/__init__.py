"""The stages of the benchmark: what LiteDet does, each against a named peer that does the same."""

from collections.abc import Callable, Iterator, Mapping

from detection.benchmark.config import Stage
from detection.benchmark.inputs import Inputs
from detection.benchmark.stages.busy import busy
from detection.benchmark.stages.data import loader, open_annotations
from detection.benchmark.stages.detectors import detectors
from detection.benchmark.stages.evaluate import evaluate
from detection.benchmark.stages.exports import exports
from detection.benchmark.stages.folder import folder
from detection.benchmark.stages.predict import backends, postprocess, predict
from detection.benchmark.stages.train import train
from detection.benchmark.timing import Comparison

STAGES: Mapping[Stage, Callable[[Inputs], Iterator[Comparison]]] = {
    "predict": predict,
    "backends": backends,
    "postprocess": postprocess,
    "folder": folder,
    "train": train,
    "detectors": detectors,
    "busy": busy,
    "loader": loader,
    "open": open_annotations,
    "evaluate": evaluate,
    "exports": exports,
}
