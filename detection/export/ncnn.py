"""ncnn (``.param`` and ``.bin``): float [3, H, W] of 0..255 in, raw heads out, weights in 32 or 16 bits; by pnnx.

ncnn has no integer input: ``ncnn::Mat::from_pixels`` gives the numbers 0..255 that the file normalises itself. The record lies
beside it as ``NAME.param.json``.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from backbones.errors import UserError
from backbones.state import write_whole
from detection.engine.quiet import quiet
from detection.export.module import Network
from detection.export.options import ExportOptions, Record, Variant
from detection.inference.exported import beside

PACKAGES = ("pnnx", "ncnn")


class NcnnFile:
    """A model of ncnn in memory.

    Args:
        param: the layers, a text.
        weights: of the .bin.
    """

    def __init__(self, param: bytes, weights: bytes) -> None:
        self.param = param
        self.weights = weights

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        write_whole(path.with_suffix(".bin"), self.weights)
        write_whole(beside(path), record.to_json().encode())
        write_whole(path, self.param)


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: a package is missing.
        UserError: int8.
    """
    import ncnn  # noqa: F401  asked for before any work is done
    import pnnx  # noqa: F401

    if options.int8:
        raise UserError("--to ncnn writes float32, or weights in 16 bits (--fp16); take litert or executorch for int8")
    yield Variant(name="", make=lambda: _converted(network, options.fp16))


def _converted(network: Network, fp16: bool) -> NcnnFile:
    import pnnx

    image = network.image.float()
    with tempfile.TemporaryDirectory(prefix="litedet-ncnn-") as folder, quiet(""):
        traced = torch.jit.trace(network.module, (image,))
        source = Path(folder, "network.pt")
        traced.save(str(source))
        shape = ",".join(map(str, image.shape))
        command = [pnnx.EXEC_PATH, str(source), f"inputshape=[{shape}]f32", f"fp16={int(fp16)}", "optlevel=2"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        param, weights = (Path(folder, f"network.ncnn.{ending}") for ending in ("param", "bin"))
        if not param.exists():
            raise RuntimeError(f"pnnx ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
        return NcnnFile(param.read_bytes(), weights.read_bytes())
