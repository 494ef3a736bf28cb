"""The check of a dataset: every fault of every split, what it holds, and what a training will leave out.

Letters in shapes: I images, N boxes (annotation records), K classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detection.checks.duplicates import find_duplicates
from detection.checks.files import FileTable, look_at_files
from detection.checks.findings import KINDS, Finding
from detection.checks.records import (
    check_boxes,
    check_classes,
    check_images,
    check_repeats,
    class_counts,
    leads_outside,
)
from detection.checks.split import Split
from detection.data.dataset import is_turned, missing_files

_NUM_NAMED = 3  # findings of a kind that the text names before it only counts
_NO_IMAGE = ("missing-image", "not-an-image", "truncated-image", "too-large", "size-differs", "no-size", "name-outside")


@dataclass(slots=True, kw_only=True)
class Checked:
    """What a check found.

    Attributes:
        splits: what was checked.
        tables: the looks at the files of each split; nothing is known in them where no image was opened.
        findings: in the order of ``KINDS``, the worst suspects first within a kind.
    """

    splits: list[Split]
    tables: list[FileTable]
    findings: list[Finding] = field(default_factory=list)

    def add(self, findings: Sequence[Finding]) -> None:
        """More findings, put in order."""
        order = {kind: place for place, kind in enumerate(KINDS)}
        self.findings = sorted(
            [*self.findings, *findings], key=lambda finding: (order[finding.kind], -(finding.score or 0.0))
        )

    def of_kind(self, kind: str) -> list[Finding]:
        return [finding for finding in self.findings if finding.kind == kind]

    def counts(self) -> dict[str, int]:
        """Findings by kind, in the order of ``KINDS``; kinds without any are not in it."""
        counted = Counter(finding.kind for finding in self.findings)
        return {kind: counted[kind] for kind in KINDS if counted[kind]}

    @property
    def num_errors(self) -> int:
        return sum(count for kind, count in self.counts().items() if KINDS[kind].severity == "error")

    @property
    def num_warnings(self) -> int:
        return len(self.findings) - self.num_errors

    def left_out(self, split: Split) -> dict[str, int]:
        """What a training will not use of a split, by reason, reasons without any left out."""
        unreadable = {
            finding.image for finding in self.findings if finding.split == split.number and finding.kind in _NO_IMAGE
        }
        usable = split.usable()
        bad = np.isin(split.images, [position for position in unreadable if position is not None])
        counted = {
            "crowds": int(split.crowd.sum()),
            "boxes without area, outside, or of no image or category": int((~usable & ~split.crowd).sum()),
            "images that cannot be read, or have another size": len(unreadable),
            "good boxes in these images": int((usable & bad).sum()),
        }
        return {reason: count for reason, count in counted.items() if count}

    def to_plain(self) -> dict[str, Any]:
        """The result for programs: fit for json."""
        return {
            "errors": self.num_errors,
            "warnings": self.num_warnings,
            "counts": self.counts(),
            "splits": [
                {
                    "name": split.name,
                    "path": str(split.path),
                    "images": len(split),
                    "boxes": len(split.images),
                    "objects_per_class": dict(zip(split.class_names, class_counts(split).tolist(), strict=True)),
                    "left_out": self.left_out(split),
                }
                for split in self.splits
            ],
            "findings": [self._plain(finding) for finding in self.findings],
        }

    def _plain(self, finding: Finding) -> dict[str, Any]:
        split = self.splits[finding.split]
        plain: dict[str, Any] = {"kind": finding.kind, "severity": finding.severity, "split": split.name}
        if finding.image is not None:
            plain |= {"image": split.file_names[finding.image], "image_id": int(split.image_ids[finding.image])}
        if finding.record is not None:
            plain["annotation_id"] = int(split.annotation_ids[finding.record])
            # Left, top, width, height as recorded; null where a number is not finite.
            plain["box"] = split.xywh[finding.record].tolist()
        if finding.other is not None:
            number, position = finding.other
            plain["other"] = {"split": self.splits[number].name, "image": self.splits[number].file_names[position]}
        if finding.score is not None:
            plain["score"] = round(finding.score, 4)
        if finding.found is not None:
            plain["found"] = {"box": [round(side, 1) for side in finding.found[0]], "class": finding.found[1]}
        return plain | {"message": finding.message}

    def __str__(self) -> str:
        lines = []
        for split in self.splits:
            lines.append(
                f"{split.name}: {len(split)} images, {len(split.images)} boxes, {len(split.class_names)} classes ({split.path})"
            )
            lines += [f"  training leaves out {count} {reason}" for reason, count in self.left_out(split).items()]
        for severity in ("error", "warning"):
            for kind, count in self.counts().items():
                if KINDS[kind].severity != severity:
                    continue
                lines.append(f"{severity}: {count} x {kind}: {KINDS[kind].title}. {KINDS[kind].mend}")
                for finding in self.of_kind(kind)[:_NUM_NAMED]:
                    lines.append(f"    {self.place(finding)}{finding.message}")
                if count > _NUM_NAMED:
                    lines.append(f"    and {count - _NUM_NAMED} more")
        counts = ((self.num_errors, "error"), (self.num_warnings, "warning"))
        lines.append(", ".join(f"{count} {what}{'' if count == 1 else 's'}" for count, what in counts))
        return "\n".join(lines)

    def place(self, finding: Finding) -> str:
        """Where a finding is, for a line of text; with a colon and a space behind it."""
        split = self.splits[finding.split]
        parts = [split.name] if len(self.splits) > 1 else []
        if finding.image is not None and not finding.message.startswith(split.file_names[finding.image]):
            parts.append(split.file_names[finding.image])
        if finding.record is not None:
            parts.append(f"annotation {split.annotation_ids[finding.record]}")
        return ", ".join(parts) + ": " if parts else ""


def check_splits(splits: list[Split], *, pixels: bool = True, workers: int | None = None) -> Checked:
    """Everything that can be found without a detector.

    Args:
        splits: the training split first; sizes that were not recorded are filled in.
        pixels: open the images. Without, only headers of those whose size is not recorded (YOLO, VOC).
        workers: processes that read images; see ``look_at_files``.

    Raises:
        UserError: a worker process was killed.
    """
    tables = [_look(split, pixels, workers) for split in splits]
    checked = Checked(splits=splits, tables=tables)
    found: list[Finding] = []
    for split, table in zip(splits, tables, strict=True):
        if split.form != "coco":
            split.take_sizes(_shown_sizes(table))
        found += [*split.findings, *check_images(split), *check_boxes(split), *check_repeats(split)]
        found += check_files(split, table)
    checked.add([*found, *check_classes(splits), *find_duplicates(splits, tables)])
    return checked


def _look(split: Split, pixels: bool, workers: int | None) -> FileTable:
    if split.image_dir is None:
        return FileTable.empty(len(split))
    if pixels or (split.form != "coco" and not split.sizes.all()):
        # A name that leads out of the folder is not followed: an empty one is missing, which nobody is told of.
        paths = ["" if leads_outside(name) else str(split.image_dir / name) for name in split.file_names]
        return look_at_files(paths, pixels=pixels, workers=workers)
    table = FileTable.empty(len(split))
    missing = set(missing_files([name for name in split.file_names if not leads_outside(name)], split.image_dir))
    for position, name in enumerate(split.file_names):
        if name in missing:
            table.faults[position] = "missing-image"
            table.messages[position] = f"{split.image_path(position)}: no such file"
    return table


def _shown_sizes(table: FileTable) -> NDArray[np.int64]:
    """int64 [I, 2], (height, width) as shown."""
    turned = table.orientations >= 5
    return np.where(turned[:, None], table.sizes[:, ::-1], table.sizes).astype(np.int64)


def check_files(split: Split, table: FileTable) -> list[Finding]:
    """What the looks at the files tell: files that are no images, and images that are not as their record says."""
    findings = []

    def find(kind: str, position: int, message: str) -> None:
        findings.append(Finding(kind=kind, split=split.number, image=position, message=message))

    for position, fault in table.faults.items():
        if not leads_outside(split.file_names[position]):
            name = split.file_names[position]
            find(fault, position, table.messages[position].replace(str(split.image_path(position)), name))
    good = (table.sizes[:, 0] > 0) & ~np.isin(np.arange(len(split)), list(table.faults))
    for position, message in table.messages.items():
        if position not in table.faults:
            find("damaged-image", position, f"{split.file_names[position]}: {message}")
    odd = (table.sizes != split.sizes).any(axis=1) | (table.orientations != 1) | (table.depths > 8) | table.cmyk
    for position in np.flatnonzero(good & odd).tolist():
        name, header = split.file_names[position], table.header(position)
        recorded = (int(split.sizes[position, 0]), int(split.sizes[position, 1]))
        turned = is_turned(header, recorded, int(split.exif[position]))
        height, width = actual = header.shown_size if turned else header.size
        if recorded[0] and recorded != actual:
            find("size-differs", position, f"{name} is {width} x {height}, recorded are {recorded[1]} x {recorded[0]}")
        if header.orientation != 1:
            told = "as its recorded size tells" if header.size != header.shown_size else "which its size does not tell"
            pixels = "turned" if turned else "stored"
            find(
                "exif-turned", position,
                f"{name}: orientation {header.orientation}; boxes are taken to count the image as {pixels}, {told}",
            )  # fmt: skip
        if table.depths[position] > 8:
            find("sixteen-bit", position, f"{name} has {table.depths[position]} bits a channel")
        if table.cmyk[position]:
            find("cmyk", position, f"{name} is in CMYK")
    return findings
