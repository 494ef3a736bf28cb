"""What MediaPipe Tasks and the TFLite Task library read in a ``.tflite`` detector: labels, input, meaning of the outputs.

The layout is the public schema of TFLite metadata (file identifier M001): a flatbuffer that the model carries in a buffer
called TFLITE_METADATA, and a zip archive at the end of the file with the label file it speaks of.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from detection.classification.exported import ClassifierRecord
from detection.inference.exported import RECORD_NAME, ExportRecord

BUFFER_NAME = "TFLITE_METADATA"
LABELS_NAME = "labels.txt"
_AXIS_LABELS, _VALUE_LABELS = 2, 3  # AssociatedFileType
_RGB = 1  # ColorSpaceType
_FEATURE, _IMAGE, _BOX = 1, 2, 3  # members of the union ContentProperties
_NORMALISATION = 1  # member of the union ProcessUnitOptions
_BOUNDARIES = 1  # BoundingBoxType


@dataclass(frozen=True, slots=True)
class _Table:
    """A flatbuffer table: (slot, value) of each field that is set; see ``_write`` for the kinds of values."""

    fields: Sequence[tuple[int, Any]]


@dataclass(frozen=True, slots=True)
class _Byte:
    value: int


def associated_files(record: ExportRecord | ClassifierRecord) -> bytes:
    """The zip archive at the end of the file: the labels, a name a line, and the record. Not compressed, as readers want it."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, text in ((LABELS_NAME, "\n".join(record.class_names) + "\n"), (RECORD_NAME, record.to_json())):
            archive.writestr(zipfile.ZipInfo(name), text)  # ZipInfo: no time of day, the same file twice
    return packed.getvalue()


def metadata(record: ExportRecord, minimal_parser: str = "1.0.0") -> bytes:
    """The metadata flatbuffer of a detector with TFLite_Detection_PostProcess.

    Args:
        record: gives size and source.
        minimal_parser: version of the reader that the fields in use need.
    """
    height, width = record.info.model.input_size
    # The file takes bytes as they are: mean 0 and standard deviation 1 say that nothing is to be done to them.
    normalisation = _Table([(0, _Byte(_NORMALISATION)), (1, _Table([(0, [0.0]), (1, [1.0])]))])
    image = _Table([(0, _Byte(_RGB)), (1, _Table([(0, width), (1, height)]))])
    taken = _Table(
        [
            (0, "image"),
            (1, "The image, RGB, uint8."),
            (3, _Table([(0, _Byte(_IMAGE)), (1, image)])),
            (4, [normalisation]),
            (5, _Table([(0, [255.0]), (1, [0.0])])),
        ]
    )
    labels = _Table([(0, LABELS_NAME), (1, "Names of the classes."), (2, _Byte(_VALUE_LABELS))])
    each = _Table([(0, 2), (1, 2)])  # ValueRange: the second axis counts the detections
    box = _Table([(0, [1, 0, 3, 2]), (1, _Byte(_BOUNDARIES))])  # the tensor's order is y1, x1, y2, x2
    feature = [(0, _Byte(_FEATURE)), (1, _Table([]))]
    given = [
        _Table([(0, "location"), (1, "Boxes."), (3, _Table([(0, _Byte(_BOX)), (1, box), (2, each)]))]),
        _Table([(0, "category"), (1, "Classes."), (3, _Table([*feature, (2, each)])), (6, [labels])]),
        _Table([(0, "score"), (1, "Scores."), (3, _Table([*feature, (2, each)]))]),
        _Table([(0, "number of detections"), (1, "How many rows are used."), (3, _Table(feature))]),
    ]
    group = _Table([(0, "detection_result"), (1, ["location", "category", "score"])])
    graph = _Table([(2, [taken]), (3, given), (8, [group])])
    model = [(0, "LiteDet"), (1, "Object detector."), (3, [graph]), (7, minimal_parser)]
    if record.info.licence:
        model.append((5, record.info.licence))
    return _finish(_Table(model))


def _finish(root: _Table) -> bytes:
    import flatbuffers

    builder = flatbuffers.Builder(1024)
    builder.Finish(_write(builder, root), b"M001")
    return bytes(builder.Output())


def _write(builder: Any, value: Any) -> int:
    """A text, a table or a vector (of floats, uint32, texts or tables) -> its offset."""
    if isinstance(value, str):
        return int(builder.CreateString(value))
    if isinstance(value, list):
        floats = all(isinstance(one, float) for one in value)
        if floats or all(isinstance(one, int) for one in value):
            builder.StartVector(4, len(value), 4)
            for one in reversed(value):
                (builder.PrependFloat32 if floats else builder.PrependUint32)(one)
            return int(builder.EndVector())
        offsets = [_write(builder, one) for one in value]
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())
    assert isinstance(value, _Table)
    # What a table points to is written before it.
    written = [(slot, one if isinstance(one, int | _Byte) else _write(builder, one), one) for slot, one in value.fields]
    builder.StartObject(max((slot for slot, _ in value.fields), default=-1) + 1)
    for slot, place, one in written:
        if isinstance(one, _Byte):
            builder.PrependUint8Slot(slot, one.value, 0)
        elif isinstance(one, int):
            builder.PrependUint32Slot(slot, one, 0)
        else:
            builder.PrependUOffsetTRelativeSlot(slot, place, 0)
    return int(builder.EndObject())
