"""What an export is asked for, and what an exporter gives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from detection.classification.exported import ClassifierRecord
from detection.export.module import Network
from detection.inference.exported import ExportRecord
from detection.postprocess import PostprocessConfig


@dataclass(kw_only=True, slots=True)
class ExportOptions:
    """What a file is to hold.

    Attributes:
        raw: stop at the raw heads; else the file decodes and suppresses.
        int8: 8-bit weights and activations.
        fp16: weights stored in 16 bits.
        postprocess: thresholds inside a file that suppresses.
        compiled: machine code for this kind of processor, where the format has it.
        calibration: uint8 [B, 3, H, W], images for the ranges of int8; None without int8.
        keep_float: layers that stay in floating point, by their names in torch.
        portable: of int8 ONNX files: a browser rounds as a processor does, for a little time.
    """

    raw: bool = False
    int8: bool = False
    fp16: bool = False
    compiled: bool = False
    postprocess: PostprocessConfig
    calibration: NDArray[np.uint8] | None = None
    keep_float: tuple[str, ...] = ()
    portable: bool = False


Record = ExportRecord | ClassifierRecord
"""What travels with a file."""


class Artefact(Protocol):
    """A network in a format, not yet under a name."""

    def write(self, path: Path, record: Record) -> None:
        """Writes the file, or files, with the record inside."""
        ...


@dataclass(kw_only=True, slots=True)
class Variant:
    """One way to make the file.

    Attributes:
        name: how it is quantised; "" for floating point.
        make: makes it; may take minutes.
    """

    name: str
    make: Callable[[], Artefact]


Exporter = Callable[[Network, ExportOptions], Iterator[Variant]]
"""A network and what is wanted -> ways to make the file, the most promising first."""
