"""torch.export: an archive (.pt2) of the network to its raw heads, any batch, with the record among its extra files.

On request an AOTInductor package of it: machine code for processors like this one, with the record beside it. It takes one image
at a time: one with a free batch takes two or more (torch 2.14), and not one.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from backbones.errors import UserError
from backbones.state import write_whole
from detection.engine.quiet import quiet
from detection.export.module import Network
from detection.export.options import ExportOptions, Record, Variant
from detection.inference.exported import KEY, beside

PACKAGES = ()


class ProgramFile:
    """An exported program in memory.

    Args:
        program: of ``torch.export.export``.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        content = io.BytesIO()
        torch.export.save(self.program, content, extra_files={KEY: record.to_json()})
        write_whole(path, content.getbuffer())


class CompiledFile:
    """An AOTInductor package in memory.

    Args:
        content: of the package.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``."""
        write_whole(beside(path), record.to_json().encode())
        write_whole(path, self.content)


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        UserError: int8, which this format does not have here.
    """
    if options.int8:
        raise UserError("--to torch writes float32; take onnx, openvino, litert or executorch for int8")

    def make() -> ProgramFile | CompiledFile:
        if options.compiled:
            return _compiled(torch.export.export(network.module, (network.image,)))
        images = network.image.repeat(2, 1, 1, 1)
        return ProgramFile(
            torch.export.export(network.module, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        )

    yield Variant(name="", make=make)


def _compiled(program: torch.export.ExportedProgram) -> CompiledFile:
    with tempfile.TemporaryDirectory() as folder, quiet(""):
        target = Path(folder, "package.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=str(target))
        return CompiledFile(target.read_bytes())
