import json
import os
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from detection.data.augment import AugmentConfig, EvalTransform, TrainTransform, ssd_augment
from detection.data.coco import CocoIndex
from detection.data.loader import (
    DetectionDataset,
    EpochSampler,
    SkippedSample,
    build_loader,
    collate,
)
from detection.images.decode import UnreadableImageError
from detection.images.place import place
from detection.structures import Batch, Sample


def write_json(folder: Path, sizes: list[tuple[int, int]], boxes: dict[int, list[list[float]]]) -> CocoIndex:
    """Images 0.jpg, 1.jpg … of these (height, width), ids from 100."""
    content = {
        "images": [{"id": 100 + i, "file_name": f"{i}.jpg", "width": w, "height": h} for i, (h, w) in enumerate(sizes)],
        "annotations": [],
        "categories": [{"id": 1, "name": "cat"}],
    }
    records = [(i, box) for i, rows in boxes.items() for box in rows]
    content["annotations"] = [
        {"id": n, "image_id": 100 + i, "category_id": 1, "bbox": box} for n, (i, box) in enumerate(records)
    ]
    (folder / "a.json").write_text(json.dumps(content))
    return CocoIndex.read(folder / "a.json")


def draw(folder: Path, name: str, size: tuple[int, int], shade: int, orientation: int = 1) -> NDArray[np.uint8]:
    image = np.full((*size, 3), shade, np.uint8)
    image[:, : size[1] // 2, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(folder / name, quality=95, exif=exif)
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve images of 40x60; number n has n % 3 boxes."""
    for number in range(12):
        draw(tmp_path, f"{number}.jpg", (40, 60), 10 * number)
    write_json(tmp_path, [(40, 60)] * 12, {n: [[10, 5, 20, 10]] * (n % 3) for n in range(12)})
    return tmp_path


def training(folder: Path, config: AugmentConfig | None = None) -> DetectionDataset:
    return DetectionDataset(
        CocoIndex.read(folder / "a.json"), folder, TrainTransform(config or AugmentConfig(), (32, 48))
    )


def evaluation(folder: Path) -> DetectionDataset:
    return DetectionDataset(CocoIndex.read(folder / "a.json"), folder, EvalTransform((32, 48)))


def test_collate_of_images_without_objects(folder: Path) -> None:
    batch = collate([training(folder)[0, 0], training(folder)[0, 3]])
    assert batch.boxes.shape == (2, 8, 4)
    assert not batch.valid.any()
    assert batch.images.shape == (2, 3, 32, 48)


def test_batch(folder: Path) -> None:
    dataset = training(folder)
    batch = collate([dataset[0, 2], dataset[0, 1]])
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.valid.tolist() == [[True] * 2 + [False] * 6, [True] + [False] * 7]
    # 60x40 becomes 48x32: everything shrinks to 0.8.
    torch.testing.assert_close(batch.boxes[0, :2], torch.tensor([[8.0, 4, 24, 12]] * 2))
    assert not batch.boxes[~batch.valid].any()
    assert batch.image_ids.tolist() == [102, 101]
    assert batch.original_sizes.tolist() == [[40, 60]] * 2
    torch.testing.assert_close(batch.placements, torch.tensor([[0.8, 0.8, 0, 0]] * 2))
    assert (batch.labels.dtype, batch.boxes.dtype, batch.image_ids.dtype) == (torch.int64, torch.float32, torch.int64)


def test_objects_are_padded_to_a_multiple_of_eight() -> None:
    def sample(num: int) -> Sample:
        ones = np.ones((num, 4), np.float32)
        image = np.zeros((8, 8, 3), np.uint8)
        return Sample(
            image=image,
            boxes=ones,
            labels=np.ones(num, np.int64),
            image_id=1,
            original_size=(8, 8),
            placement=(1, 1, 0, 0),  # type: ignore[arg-type]
        )

    assert [collate([sample(n), sample(1)]).boxes.shape[1] for n in (0, 1, 8, 9, 17)] == [8, 8, 8, 16, 24]


def test_evaluation_gives_the_pixels_of_the_predictor(folder: Path) -> None:
    import cv2

    sample = evaluation(folder)[0, 4]
    assert isinstance(sample, Sample)
    image = np.asarray(cv2.cvtColor(cv2.imread(str(folder / "4.jpg")), cv2.COLOR_BGR2RGB), np.uint8)
    np.testing.assert_array_equal(sample.image, place(image, (32, 48), "stretch", (0, 0, 0))[0])
    assert sample.image[10, 5, 0] > 240, "red comes first"


def test_boxes_are_cut_off_at_the_image_before_they_are_placed(tmp_path: Path) -> None:
    draw(tmp_path, "0.jpg", (40, 60), 0)
    write_json(tmp_path, [(40, 60)], {0: [[-10, 5, 30, 100]]})
    # The canvas of an expanded image is larger than the image; a box must not reach into its fill.
    config = AugmentConfig(expand_probability=1.0, expand_max_scale=2.0)
    for epoch in range(10):
        sample = training(tmp_path, config)[epoch, 0]
        assert isinstance(sample, Sample)
        scale_x, scale_y, offset_x, offset_y = sample.placement
        expected = [offset_x, 5 * scale_y + offset_y, 20 * scale_x + offset_x, 40 * scale_y + offset_y]
        np.testing.assert_allclose(sample.boxes[0], np.clip(expected, 0, [48, 32, 48, 32]), atol=1e-4)


def test_a_large_jpeg_is_decoded_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, "0.jpg", (403, 601), 0)
    write_json(tmp_path, [(403, 601)], {0: [[0, 0, 300, 403]]})
    import cv2

    shapes: list[Any] = []
    imdecode = cv2.imdecode

    def watched(data: Any, flags: int) -> Any:
        image = imdecode(data, flags)
        shapes.append(image.shape[:2])
        return image

    monkeypatch.setattr(cv2, "imdecode", watched)
    sample = training(tmp_path)[0, 0]
    assert isinstance(sample, Sample)
    assert shapes == [(51, 76)]  # 403 / 8 and 601 / 8, rounded up
    edge = int(sample.boxes[0, 2])
    assert abs(edge - 24) <= 1
    assert sample.image[16, edge - 2, 0] > 200
    assert sample.image[16, edge + 2, 0] < 60


@pytest.mark.parametrize(
    ("orientation", "stated", "turned"), [(6, (40, 60), False), (6, (60, 40), True), (1, (40, 60), False)]
)
def test_exif_orientation_follows_the_annotation(
    tmp_path: Path, orientation: int, stated: tuple[int, int], turned: bool
) -> None:
    draw(tmp_path, "0.jpg", (40, 60), 0, orientation)
    write_json(tmp_path, [stated], {})
    dataset = DetectionDataset(CocoIndex.read(tmp_path / "a.json"), tmp_path, EvalTransform(stated))
    sample = dataset[0, 0]
    assert isinstance(sample, Sample)
    # The left half is red; turned by 90 degrees clockwise, as tag 6 asks, the upper half is.
    assert sample.image[5, -5, 0] > 200 if turned else sample.image[-5, 5, 0] > 200
    assert sample.image[-5, 5, 0] < 50 if turned else sample.image[5, -5, 0] < 50


def test_unreadable_images(folder: Path) -> None:
    (folder / "1.jpg").unlink()
    (folder / "2.jpg").write_bytes((folder / "2.jpg").read_bytes()[:40])
    (folder / "4.jpg").write_bytes(b"")
    draw(folder, "5.jpg", (41, 60), 0)
    reasons = {
        1: "1.jpg: No such file or directory",
        2: "2.jpg: the image does not decode (40 bytes)",
        4: "4.jpg: the image does not decode (0 bytes)",
        5: "5.jpg: the image is 60x41 pixels, its annotation says 60x40",
    }
    for position, reason in reasons.items():
        skipped = evaluation(folder)[0, position]
        assert isinstance(skipped, SkippedSample)
        assert skipped.reason == f"{folder}/{reason}"
        sample = training(folder)[0, position]
        assert isinstance(sample, Sample)
        assert sample.skipped[0] == f"{folder}/{reason}"
        assert sample.image_id not in {101, 102, 104, 105}
        again = training(folder)[0, position]
        assert isinstance(again, Sample)
        assert again.image_id == sample.image_id

    batches = list(build_loader(evaluation(folder), batch_size=2))
    assert [image_id for batch in batches for image_id in batch.image_ids.tolist()] == [
        100, 103, 106, 107, 108, 109, 110, 111,
    ]  # fmt: skip
    assert sorted(reason for batch in batches for reason in batch.skipped) == sorted(
        f"{folder}/{reason}" for reason in reasons.values()
    )
    assert batches[2].images.shape == (0, 3, 32, 48)  # both of its images are unreadable
    assert batches[2].boxes.shape[0] == batches[2].original_sizes.shape[0] == 0

    (batch,) = build_loader(training(folder), batch_size=12)
    assert len(batch) == 12
    assert {f"{folder}/{reason}" for reason in reasons.values()} == set(batch.skipped)


def test_too_many_unreadable_images_in_a_row_end_it(folder: Path) -> None:
    dataset = training(folder)
    for path in folder.glob("*.jpg"):
        path.write_bytes(b"nothing")
    with pytest.raises(UnreadableImageError, match=r"21 images in a row cannot be read; the first: .*3.jpg"):
        dataset[0, 3]


def test_a_wrong_folder_is_found_before_training(folder: Path, tmp_path: Path) -> None:
    index, transform = CocoIndex.read(folder / "a.json"), EvalTransform((32, 48))
    with pytest.raises(FileNotFoundError, match=r"image folder .*none does not exist"):
        DetectionDataset(index, folder / "none", transform)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty has none of 12 images of .*a.json; .*0.jpg"):
        DetectionDataset(index, tmp_path / "empty", transform)


def test_nothing_to_train_on(tmp_path: Path) -> None:
    draw(tmp_path, "0.jpg", (40, 60), 0)
    write_json(tmp_path, [(40, 60)], {})
    with pytest.raises(ValueError, match="nothing to learn: 1 images, 0 annotations"):
        training(tmp_path)
    assert len(evaluation(tmp_path)) == 1


def test_a_batch_larger_than_the_data_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch size 13 is larger than the 12 images per process"):
        build_loader(training(folder), batch_size=13)
    with pytest.raises(ValueError, match="batch size 7 is larger than the 6 images per process"):
        build_loader(training(folder), batch_size=7, world_size=2)


def test_sampler() -> None:
    one = EpochSampler(11, training=True, seed=5)
    one.set_epoch(3)
    order = list(one)
    assert [epoch for epoch, _ in order] == [3] * 11
    assert sorted(position for _, position in order) == list(range(11))
    assert list(one) == order
    one.set_epoch(3, first_key=4)
    assert list(one) == order[4:]
    one.set_epoch(4)
    assert [position for _, position in one] != [position for _, position in order]

    ranks = [EpochSampler(11, training=True, seed=5, rank=rank, world_size=4) for rank in range(4)]
    shards = [[position for _, position in sampler] for sampler in ranks]
    assert [len(shard) for shard in shards] == [len(sampler) for sampler in ranks] == [2] * 4
    assert len(set(chain.from_iterable(shards))) == 8

    ranks = [EpochSampler(11, training=False, rank=rank, world_size=4) for rank in range(4)]
    shards = [[position for _, position in sampler] for sampler in ranks]
    assert [len(shard) for shard in shards] == [len(sampler) for sampler in ranks] == [3, 3, 3, 2]
    assert sorted(chain.from_iterable(shards)) == list(range(11))
    with pytest.raises(ValueError, match="rank is 4 and world_size 4"):
        EpochSampler(11, training=True, rank=4, world_size=4)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_epoch_begins_in_its_middle_without_decoding_what_is_before(folder: Path, num_workers: int) -> None:
    loader = build_loader(training(folder, ssd_augment()), batch_size=2, num_workers=num_workers, seed=1)
    loader.set_epoch(1)
    whole = list(loader)
    kept = {int(number) for batch in whole[4:] for number in batch.image_ids}
    for number in range(12):
        if 100 + number not in kept:
            (folder / f"{number}.jpg").unlink()
    loader.set_epoch(1, first_batch=4)
    rest = list(loader)
    assert (len(whole), len(rest), len(loader)) == (6, 2, 6)
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.boxes, b.boxes)
        assert not b.skipped


def epochs(dataset: DetectionDataset, num_workers: int) -> list[list[Batch]]:
    loader = build_loader(dataset, batch_size=5, num_workers=num_workers, seed=1)
    result = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        result.append(list(loader))
    return result


def test_samples_are_the_same_with_and_without_workers(folder: Path) -> None:
    here, there = (epochs(training(folder, ssd_augment()), num_workers) for num_workers in (0, 2))
    for a, b in zip(chain.from_iterable(here), chain.from_iterable(there), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.image_ids, b.image_ids)
    assert [len(batch) for batch in here[0]] == [5, 5]  # the last two images make no batch
    assert not torch.equal(here[0][0].images, here[1][0].images)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_long_epoch_does_not_grow(folder: Path) -> None:
    dataset = training(folder, ssd_augment())

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    for index in range(100):
        dataset[0, index % 12]
    before = resident()
    for index in range(600):
        dataset[1, index % 12]
    assert resident() - before < 2 << 20
