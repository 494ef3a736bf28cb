"""torch.export: an archive (.pt2) of the network to its raw heads, any batch, with the record among its extra files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from backbones.errors import UserError
from detection.export.module import RawHeads
from detection.export.options import ExportOptions, Variant
from detection.inference.exported import KEY, ExportRecord
from detection.models.detector import Detector

PACKAGES = ()


class ProgramFile:
    """An exported program in memory.

    Args:
        program: of ``torch.export.export``.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.program = program

    def write(self, path: Path, record: ExportRecord) -> None:
        """See ``Artefact``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".part-{path.name}")  # torch wants the ending
        try:
            torch.export.save(self.program, staged, extra_files={KEY: record.to_json()})
            os.replace(staged, path)
        finally:
            staged.unlink(missing_ok=True)


def variants(model: Detector, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        UserError: int8, which this format does not have here.
    """
    if options.int8 or options.fp16:
        raise UserError("--to torch writes float32; take onnx, openvino or litert for int8")
    if not options.raw:
        raise UserError("--to torch ends at the raw heads; add --raw, or take onnx, openvino or litert")

    def make() -> ProgramFile:
        images = torch.zeros(2, 3, *model.config.input_size, dtype=torch.uint8)
        shapes = ({0: torch.export.Dim("batch")},)
        return ProgramFile(torch.export.export(RawHeads(model), (images,), dynamic_shapes=shapes))

    yield Variant(name="", make=make)
