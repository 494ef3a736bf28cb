"""OpenVINO's own format: float32, weights in 16 bits, or int8 by NNCF. The network comes from the ONNX file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.engine.quiet import quiet
from detection.export.module import Network
from detection.export.onnx import LEARNT, TAIL, joined, network_onnx, nodes_of, tail_of
from detection.export.options import ExportOptions, Record, Variant
from detection.inference.exported import KEY
from detection.inference.runners import openvino_core

PACKAGES = ("onnx", "onnxscript", "openvino")

_INT8: dict[str, dict[str, Any]] = {
    "NNCF, preset performance": {"preset": "PERFORMANCE"},
    "NNCF, preset mixed": {"preset": "MIXED"},
    "NNCF, preset mixed, accurate bias correction": {"preset": "MIXED", "fast_bias_correction": False},
}


class OpenVinoFile:
    """A model of OpenVINO in memory; on disk it is an ``.xml`` and a ``.bin`` of the same name.

    Args:
        model: an ``openvino.Model``.
        fp16: store the weights in 16 bits.
    """

    def __init__(self, model: Any, fp16: bool) -> None:
        self.model = model
        self.fp16 = fp16

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        import openvino

        self.model.set_rt_info(record.to_json(), [KEY])
        path.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: the weights of an older file and the graph of a newer one are never seen together
        # for longer than two renames take.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            staged = Path(folder, path.name)
            openvino.save_model(self.model, staged, compress_to_fp16=self.fp16)
            os.replace(staged.with_suffix(".bin"), path.with_suffix(".bin"))
            os.replace(staged, path)


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
    """
    content, tail = network_onnx(network), tail_of(network, options)
    kept = nodes_of(content, network, options.keep_float)
    if tail is not None:
        content = joined(content, tail)
    core = openvino_core()
    if network.learnt or not options.int8:
        name = LEARNT if network.learnt else ""
        yield Variant(name=name, make=lambda: OpenVinoFile(core.read_model(content), options.fp16))
        return
    assert options.calibration is not None
    _nncf()  # asked for before any work is done
    for name, settings in _INT8.items():
        yield Variant(name=name, make=partial(_quantised, content, options.calibration, kept, **settings))


def _quantised(
    content: bytes, calibration: NDArray[np.uint8], kept: list[str], *, preset: str, fast_bias_correction: bool = True
) -> OpenVinoFile:
    nncf = _nncf()
    model = openvino_core().read_model(content)
    names = [node.get_friendly_name() for node in model.get_ops()]
    ignored = [name for name in names if name.startswith(TAIL) or name in kept]
    with quiet():
        quantised = nncf.quantize(
            model,
            nncf.Dataset([calibration[place : place + 1] for place in range(len(calibration))]),
            preset=getattr(nncf.QuantizationPreset, preset),
            subset_size=len(calibration),
            fast_bias_correction=fast_bias_correction,
            ignored_scope=nncf.IgnoredScope(names=ignored, validate=False) if ignored else None,
        )
    return OpenVinoFile(quantised, fp16=False)


def _nncf() -> Any:
    """The package NNCF, which from then on reports errors alone.

    Raises:
        ImportError: it is not installed.
    """
    with quiet("torch.utils.cpp_extension"):  # it imports that, and so one learns that there is no CUDA
        import nncf
    nncf.set_log_level(logging.ERROR)
    return nncf
