"""ExecuTorch (``.pte``): uint8 [1, 3, H, W] in, raw heads out, XNNPACK kernels; float32, or int8 by PT2E quantisation.

Suppression has sizes that depend on the data, which ExecuTorch does not lower, so a file ends at the raw heads. The record is in
a zip archive behind the program, as in a ``.tflite`` file.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.state import write_whole
from detection.engine.quiet import quiet
from detection.export.litert_metadata import associated_files
from detection.export.module import Network
from detection.export.options import ExportOptions, Record, Variant

PACKAGES = ("executorch", "torchao")
_INT8 = {"XNNPACK, per channel": True, "XNNPACK, per tensor": False}
_LOGS = ("", "executorch", "torchao", "torch.utils._pytree")


class ProgramFile:
    """A program in memory.

    Args:
        content: of the file, without a record.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        write_whole(path, self.content + associated_files(record))


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
    """
    with quiet(*_LOGS):
        import executorch.exir  # noqa: F401  asked for before any work is done

    if not options.int8:
        yield Variant(name="", make=lambda: ProgramFile(_lowered(network.module, network.image)))
        return
    assert options.calibration is not None
    for name, per_channel in _INT8.items():
        make = partial(_quantised, network, options.calibration, options.keep_float, per_channel)
        yield Variant(name=name, make=make)


def _lowered(module: torch.nn.Module, image: torch.Tensor) -> bytes:
    """The program of a module, as much of it as XNNPACK has kernels for handed to XNNPACK."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quiet(*_LOGS):
        program = torch.export.export(module, (image,))
        edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
        return bytes(edge.to_executorch().buffer)


def _quantised(
    network: Network, calibration: NDArray[np.uint8], keep_float: tuple[str, ...], per_channel: bool
) -> ProgramFile:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import get_module_name_filter

    with quiet(*_LOGS), torch.no_grad():
        quantizer = XNNPACKQuantizer().set_global(get_symmetric_quantization_config(is_per_channel=per_channel))
        kept = [get_module_name_filter(layer) for layer in keep_float]
        quantizer.set_filter_function(lambda node: not any(is_in(node) for is_in in kept))
        module = prepare_pt2e(torch.export.export(network.module, (network.image,)).module(), quantizer)
        for pixels in calibration:
            module(torch.from_numpy(pixels[None]))
        return ProgramFile(_lowered(convert_pt2e(module), network.image))
