import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data.augment import AugmentConfig, EvalTransform, TrainTransform
from detection.data.coco import CocoIndex
from detection.data.dataset import DetectionDataset, SkippedSample, check_images
from detection.images.place import place
from detection.structures import Sample


def write_index(folder: Path, names: list[str], size: tuple[int, int] = (40, 60)) -> CocoIndex:
    content: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": name, "height": size[0], "width": size[1]} for number, name in enumerate(names)
        ],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 2, 10, 20]} for number in range(len(names))
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    (folder / "a.json").write_text(json.dumps(content))
    return CocoIndex.read(folder / "a.json")


def draw(path: Path, size: tuple[int, int] = (40, 60)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)


@pytest.mark.parametrize("num", [3, 40])  # asked for one by one, and listed
def test_missing_images_are_named_in_order(tmp_path: Path, num: int) -> None:
    names = [f"{folder}{number}.jpg" for number in range(num) for folder in ("", "sub/")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    index = write_index(tmp_path, names)
    assert check_images(index, tmp_path) == []
    (tmp_path / "sub/2.jpg").unlink()
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "1.jpg").mkdir()  # no file
    assert check_images(index, tmp_path) == ["1.jpg", "sub/2.jpg"]
    (tmp_path / "sub/2.jpg").symlink_to(tmp_path / "0.jpg")
    assert check_images(index, tmp_path) == ["1.jpg"]
    odd = write_index(tmp_path, [*names, "none/a.jpg", *(f"nowhere/{n}.jpg" for n in range(num)), "a\0b.jpg", ""])
    assert check_images(odd, tmp_path)[:2] == ["1.jpg", "none/a.jpg"]
    assert len(check_images(odd, tmp_path)) == num + 4
    with pytest.raises(FileNotFoundError, match=r"image folder .*absent does not exist"):
        check_images(index, tmp_path / "absent")


@pytest.mark.parametrize("name", ["../a.jpg", "sub/../../a.jpg", "sub/../a.jpg", "/etc/a.jpg", ".."])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    draw(tmp_path / "images/b.jpg")
    draw(tmp_path / "a.jpg")
    index = write_index(tmp_path, ["b.jpg", name])
    message = "1 file names lead out of the image folder .*images, the first is '"
    with pytest.raises(ValueError, match=message):
        check_images(index, tmp_path / "images")
    with pytest.raises(ValueError, match=message):
        DetectionDataset(index, tmp_path / "images", EvalTransform((32, 32)))


def test_absolute_names_and_links_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "elsewhere/a.png")
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").symlink_to(tmp_path / "elsewhere/a.png")
    (tmp_path / "images/sub").symlink_to(tmp_path / "elsewhere")
    draw(tmp_path / "images/a..png")  # two dots in a name are no way out
    names = [str(tmp_path / "images/a.png"), "sub/a.png", "a..png"]
    index = write_index(tmp_path, names)
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "images", Path("images")):
        assert check_images(index, folder) == []
        dataset = DetectionDataset(index, folder, EvalTransform((32, 32)))
        assert all(isinstance(dataset[0, position], Sample) for position in range(3))


def test_an_image_above_the_limit_is_skipped(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    index = write_index(tmp_path, ["a.png"])
    skipped = DetectionDataset(index, tmp_path, EvalTransform((32, 32)), max_pixels=2399)[0, 0]
    assert isinstance(skipped, SkippedSample)
    assert "a.png: the image is 60x40 pixels" in skipped.reason
    assert isinstance(DetectionDataset(index, tmp_path, EvalTransform((32, 32)), max_pixels=2400)[0, 0], Sample)


def test_what_is_no_image_hangs_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    draw(tmp_path / "a.png")
    (tmp_path / "text.jpg").write_text("text")
    index = write_index(tmp_path, ["a.png", "pipe.jpg", "text.jpg", "a\0b.jpg"])
    with caplog.at_level(logging.WARNING):
        dataset = DetectionDataset(index, tmp_path, EvalTransform((32, 32)))
    assert not caplog.records
    reasons = [sample.reason for position in (1, 2, 3) if isinstance(sample := dataset[0, position], SkippedSample)]
    assert [reason.rpartition("/")[2] for reason in reasons[:2]] == [
        "pipe.jpg: a pipe, a socket or a device, not an image file",
        "text.jpg: the image does not decode (4 bytes)",
    ]
    assert "is no file name" in reasons[2]


def test_training_takes_tensorflows_pixels_where_the_detector_was_trained_with_them(tmp_path: Path) -> None:
    draw(tmp_path / "a.jpg", (400, 600))  # noise, decoded at full size: every pixel that is skipped shows
    index = write_index(tmp_path, ["a.jpg"], (400, 600))
    transform = TrainTransform(AugmentConfig(), (48, 64), resize_mode="stretch_tensorflow")
    dataset = DetectionDataset(index, tmp_path, transform)
    sample = dataset[0, 0]
    assert isinstance(sample, Sample)
    expected, placement = place(dataset.image(0), (48, 64), "stretch_tensorflow", (0, 0, 0))
    np.testing.assert_array_equal(sample.image, expected)
    assert sample.placement == placement
