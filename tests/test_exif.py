"""Boxes lie on their objects, whichever way up an image is stored: each dataset format, in training, evaluation, prediction."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from detection.data.augment import AugmentConfig, EvalTransform, TrainTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, ExifRule
from detection.data.formats.voc import convert_voc
from detection.data.formats.yolo import convert_yolo
from detection.images.decode import read_image
from detection.structures import Sample
from detection.training.config import DataConfig, DetectionConfig
from detection.training.task import DetectionTask

SIZES = [(40, 60), (60, 40), (48, 48)]  # (height, width) as shown
ORIENTATIONS = range(1, 9)
BOX = (4, 8, 20, 16)  # xyxy in the image as shown
STORED = {  # how an image that is shown upright has to lie in the file
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, 1),
    7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
    8: lambda image: np.rot90(image, -1),
}


def draw(path: Path, size: tuple[int, int], orientation: int) -> tuple[tuple[int, int], tuple[int, ...]]:
    """An image that shows a bright rectangle at ``BOX``; its size and the rectangle in the pixels as stored."""
    image = np.full((*size, 3), 10, np.uint8)
    x1, y1, x2, y2 = BOX
    image[y1:y2, x1:x2] = 240
    stored = np.ascontiguousarray(STORED[orientation](image))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    rows, columns = np.nonzero(stored[..., 0] > 128)
    return stored.shape[:2], (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


def is_on(image: NDArray[np.uint8], box: Any) -> bool:
    """Bright under the box, dark everywhere else."""
    x1, y1, x2, y2 = np.round(np.asarray(box)).astype(int)
    under = image[y1:y2, x1:x2]
    rest = image.astype(int).sum() - under.astype(int).sum()
    return bool(under.min() > 200 and rest / max(image.size - under.size, 1) < 15)


def samples(index: CocoIndex, folder: Path, exif: ExifRule = "auto") -> list[Sample]:
    """Each image for training and for evaluation, at its own size."""
    result = []
    for position in range(len(index)):
        size = index.size(position)
        for transform in (TrainTransform(AugmentConfig(), size), EvalTransform(size)):
            sample = DetectionDataset(index, folder, transform, exif=exif)[0, position]
            assert isinstance(sample, Sample), sample
            assert sample.original_size == size
            result.append(sample)
    return result


def check(index: CocoIndex, folder: Path, exif: ExifRule = "auto") -> None:
    found = samples(index, folder, exif)
    assert found
    for sample in found:
        assert len(sample.boxes) == 1
        assert is_on(sample.image, sample.boxes[0])
    dataset = DetectionDataset(index, folder, EvalTransform((32, 32)), exif=exif)
    assert is_on(dataset.image(0), index.objects(0).boxes[0])


def write_coco(
    path: Path, size: tuple[int, int], box: tuple[int, ...], said: Any = None, info: Any = None
) -> CocoIndex:
    image: dict[str, Any] = {"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}
    if said is not None:
        image["exif_orientation"] = said
    x1, y1, x2, y2 = (int(edge) for edge in box)
    content = {
        "info": info,
        "images": [image],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1]}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    path.write_text(json.dumps(content))
    return CocoIndex.read(path)


def open_case(size: tuple[int, int], orientation: int) -> bool:
    """Whether the size does not tell which pixels are meant."""
    return orientation != 1 and (orientation < 5 or size[0] == size[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_coco(tmp_path: Path, size: tuple[int, int], orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    stored_size, stored_box = draw(tmp_path / "a.png", size, orientation)
    as_shown = write_coco(tmp_path / "shown.json", size, BOX)
    with caplog.at_level(logging.WARNING):
        check(as_shown, tmp_path)
    assert ("1 of 1 images have an EXIF tag that turns them without" in caplog.text) == open_case(size, orientation)
    assert is_on(read_image(tmp_path / "a.png"), BOX)  # what Predictor takes

    # Drawn on the stored pixels: the size tells, or the file, or the setting.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check(write_coco(tmp_path / "said.json", stored_size, stored_box, "ignored"), tmp_path)
        check(
            write_coco(tmp_path / "info.json", stored_size, stored_box, None, {"exif_orientation": "ignored"}), tmp_path
        )
        as_stored = write_coco(tmp_path / "stored.json", stored_size, stored_box)
        check(as_stored, tmp_path, "ignored")
        # The setting overrules the file, and the image's size overrules both.
        check(write_coco(tmp_path / "lies.json", stored_size, stored_box, "applied"), tmp_path, "ignored")
        if not open_case(size, orientation):
            check(as_stored, tmp_path, "applied")
            check(as_shown, tmp_path, "ignored")
    assert "EXIF" not in caplog.text


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_yolo(tmp_path: Path, size: tuple[int, int], orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    draw(tmp_path / "a.png", size, orientation)
    x1, y1, x2, y2 = BOX
    height, width = size
    row = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
    (tmp_path / "a.txt").write_text(f"0 {' '.join(map(str, row))}")
    (tmp_path / "names").write_text("cat")
    convert_yolo(tmp_path, tmp_path, tmp_path / "names", tmp_path / "out.json")
    with caplog.at_level(logging.WARNING):
        check(CocoIndex.read(tmp_path / "out.json"), tmp_path)
    assert "EXIF" not in caplog.text, "the converter has told"


def write_voc(folder: Path, stem: str, size: tuple[int, int], box: tuple[int, ...]) -> None:
    x1, y1, x2, y2 = box
    corners = f"<xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
    (folder / f"{stem}.xml").write_text(
        f"<annotation><size><width>{size[1]}</width><height>{size[0]}</height></size>"
        f"<object><name>cat</name><bndbox>{corners}</bndbox></object></annotation>"
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_voc(tmp_path: Path, size: tuple[int, int], orientation: int, caplog: pytest.LogCaptureFixture) -> None:
    for rule in ("applied", "ignored"):
        folder = tmp_path / rule
        folder.mkdir()
        stored = draw(folder / "a.png", size, orientation)
        write_voc(folder, "a", *((size, BOX) if rule == "applied" else stored))
        report = convert_voc(folder, folder, folder / "out.json", exif=rule)
        assert not report.notes
        with caplog.at_level(logging.WARNING):
            check(CocoIndex.read(folder / "out.json"), folder)
        if not open_case(size, orientation):
            convert_voc(folder, folder, folder / "out.json")
            check(CocoIndex.read(folder / "out.json"), folder)
    assert "EXIF" not in caplog.text


@pytest.mark.parametrize("orientation", [2, 3, 4])
def test_voc_asks_the_other_images(tmp_path: Path, orientation: int) -> None:
    """The XML files of a camera's images that lie on their side tell what the tool did with all of them."""
    stored = draw(tmp_path / "open.png", (40, 60), orientation)
    write_voc(tmp_path, "open", *stored)
    report = convert_voc(tmp_path, tmp_path, tmp_path / "out.json")
    (note,) = report.notes
    assert note.startswith("EXIF tag of which the size does not tell")
    assert samples(CocoIndex.read(tmp_path / "out.json"), tmp_path)[0].boxes.shape == (1, 4)
    told = draw(tmp_path / "tells.png", (40, 60), 6)
    write_voc(tmp_path, "tells", *told)
    assert not convert_voc(tmp_path, tmp_path, tmp_path / "out.json").notes
    check(CocoIndex.read(tmp_path / "out.json"), tmp_path)


@pytest.mark.parametrize("said", [6, {"Orientation": 6}, "Rotated", ["applied"]])
def test_what_other_tools_keep_under_the_name_is_passed_over(tmp_path: Path, said: Any) -> None:
    draw(tmp_path / "a.png", (40, 60), 2)
    assert write_coco(tmp_path / "a.json", (40, 60), BOX, said, {"exif_orientation": said}).exif.tolist() == [0]
    assert write_coco(tmp_path / "a.json", (40, 60), BOX, said, [1]).exif.tolist() == [0]


def test_the_settings_of_training_reach_the_images(tmp_path: Path) -> None:
    stored_size, stored_box = draw(tmp_path / "a.png", (40, 60), 3)
    index = write_coco(tmp_path / "a.json", stored_size, stored_box)
    task = object.__new__(DetectionTask)  # of a whole training the data alone
    task.config = DetectionConfig(data=DataConfig(exif="ignored"))
    dataset = task._dataset(index, tmp_path, EvalTransform(stored_size))
    assert is_on(dataset.image(0), stored_box)
    task.config.data.max_pixels = 2399
    with pytest.raises(ValueError, match="60x40 pixels"):
        task._dataset(index, tmp_path, EvalTransform(stored_size)).image(0)
