"""Every format at once, as one table: format, size, time of an image, AP, drop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from backbones.errors import UserError
from backbones.state import write_whole
from detection.export.run import FP16, INT8, ExportJob, export, open_subject, signed
from detection.export.verification import processor_name
from detection.inference.exported import SUFFIXES

NAME = "exports"
"""The table's files are ``exports.md`` and ``exports.json``."""


@dataclass(kw_only=True, slots=True)
class ExportRow:
    """One file, or why there is none.

    Attributes:
        format: "torch (checkpoint)" is what all are compared with.
        precision: number format.
        file: its name in the folder; "" where there is none.
        size: in bytes, with what belongs beside it.
        milliseconds: shortest time of one image on this machine; None: not run.
        figure: AP, of a classifier top-1; None: not measured.
        drop: what it loses; None: not measured.
        note: the variant, or why there is no file, or why it was not run.
    """

    format: str
    precision: str
    file: str = ""
    size: int = 0
    milliseconds: float | None = None
    figure: float | None = None
    drop: float | None = None
    note: str = ""


@dataclass(kw_only=True, slots=True)
class ExportTable:
    """What ``exports.json`` holds.

    Attributes:
        checkpoint: its name.
        checkpoint_sha256: of its content.
        figure_name: "AP" or "top-1".
        num_images: that the figure was measured on; 0: it was not.
        annotations: name of the file, or folder, that says what is right.
        processor: what ran the files.
        rows: the table.
    """

    checkpoint: str
    checkpoint_sha256: str
    figure_name: str
    num_images: int
    annotations: str
    processor: str
    rows: list[ExportRow]

    def markdown(self) -> str:
        """The table for people."""
        on = f", {self.figure_name} on {self.num_images} images of {self.annotations}" if self.num_images else ""
        lines = [
            f"{self.checkpoint} on {self.processor}{on}",
            "",
            f"| format | numbers | MB | ms an image | {self.figure_name} | drop | |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            size = f"{row.size / 1e6:.2f}" if row.size else ""
            shown = (
                _number(row.milliseconds, ".1f"),
                _number(row.figure, ".4f"),
                "" if row.drop is None else signed(row.drop),
            )
            lines.append(f"| {row.format} | {row.precision} | {size} | {' | '.join(shown)} | {row.note} |")
        return "\n".join(lines) + "\n"


def export_all(job: ExportJob, folder: Path, say: Callable[[str], None] = print) -> ExportTable:
    """Exports to every format whose packages are installed, in every number format, and measures them.

    A format that is missing here, but stands in the folder's table from another environment with the same checkpoint and
    images, keeps its rows: LiteRT's packages want an environment of their own.

    Args:
        job: ``to`` and ``out`` play no part. int8 needs its calibration.
        folder: for the files and the table.
        say: takes a line for each step.

    Raises:
        UserError: options that do not fit; a file that does not match the checkpoint is a row with its reason.
    """
    # In a format that takes every checkpoint, for what the checkpoint itself has.
    subject = open_subject(replace(job, to="onnx", out=folder / "x.onnx", int8=False, calibration=None), ())
    job = replace(job, known_figure=subject.figure_torch)
    measured = subject.record.measured
    table = ExportTable(
        checkpoint=Path(job.checkpoint).name,
        checkpoint_sha256=subject.record.checkpoint_sha256,
        figure_name=subject.figure_name,
        num_images=measured.num_images,
        annotations=getattr(measured, "annotations", "") or getattr(measured, "images", ""),
        processor=processor_name(),
        rows=[
            ExportRow(
                format="torch (checkpoint)",
                precision="float32",
                milliseconds=subject.milliseconds_torch(),
                figure=subject.figure_torch,
            )
        ],
    )
    former = _former(folder, table)
    for one in _jobs(job, folder):
        say(f"--- {one.to}, {one.precision}")
        row = _row(one, say)
        before = former.pop((row.format, row.precision), None)
        table.rows.append(row if row.file or before is None else before)
        # With the rows of before that are still to come: a run that is stopped loses none.
        _write(folder, replace(table, rows=[*table.rows, *former.values()]))
    return table


def _jobs(job: ExportJob, folder: Path) -> list[ExportJob]:
    plain = replace(job, int8=False, fp16=False, calibration=None, keep_float=())
    jobs = []
    for suffix, to in SUFFIXES.items():
        jobs.append(replace(plain, to=to, out=folder / f"{to}_float32{suffix}"))
        if to in FP16:
            jobs.append(replace(plain, to=to, out=folder / f"{to}_fp16{suffix}", fp16=True))
        if job.calibration is not None and to in INT8:
            calibrated = replace(plain, int8=True, calibration=job.calibration, keep_float=job.keep_float)
            jobs.append(replace(calibrated, to=to, out=folder / f"{to}_int8{suffix}"))
    return jobs


def _row(job: ExportJob, say: Callable[[str], None]) -> ExportRow:
    row = ExportRow(format=job.to, precision=job.precision)
    try:
        result = export(job, say)
    except UserError as error:
        say(f"not made: {error}")
        row.note = f"not made: {error}"
        return row
    row.file, row.size, row.milliseconds = job.out.name, result.chosen.size, result.chosen.milliseconds
    row.figure, row.drop, row.note = result.chosen.figure, result.drop, result.chosen.name
    if result.chosen.difference is None:
        from detection.export.coreml import NOT_RUN

        row.note = NOT_RUN
    return row


def _former(folder: Path, table: ExportTable) -> dict[tuple[str, str], ExportRow]:
    """Rows of files in the folder that an earlier run made of the same checkpoint and measured on the same images."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return {}
    plain = json.loads(path.read_text())
    same = ("checkpoint_sha256", "num_images", "annotations", "processor")
    if any(plain.get(name) != getattr(table, name) for name in same):
        return {}
    rows = [ExportRow(**row) for row in plain["rows"]]
    return {(row.format, row.precision): row for row in rows if row.file and (folder / row.file).exists()}


def _write(folder: Path, table: ExportTable) -> None:
    write_whole(folder / f"{NAME}.json", (json.dumps(asdict(table), indent=1) + "\n").encode())
    write_whole(folder / f"{NAME}.md", table.markdown().encode())


def _number(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
