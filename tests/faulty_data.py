"""A small drawn dataset with one of each fault."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from detection.data.drawn import draw_image

SIZE = (96, 128)


def draw(folder: Path, name: str, seed: int, size: tuple[int, int] = SIZE, **options: Any) -> Path:
    """An image file; what its suffix says is what it is."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = draw_image(np.random.default_rng(seed), size).image
    Image.fromarray(pixels).save(folder / name, **options)
    return folder / name


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def faulty_set(folder: Path) -> tuple[Path, Path, Path]:
    """(training file, validation file, image folder). What is wrong with each record, its comment says."""
    images = folder / "images"
    names = [f"good{number}.jpg" for number in range(12)]
    for seed, name in enumerate(names):
        draw(images, name, seed, quality=90)
    records: list[dict[str, Any]] = []
    boxes: list[dict[str, Any]] = []

    def image(name: str, size: tuple[int, int] = SIZE, **more: Any) -> int:
        records.append({"id": len(records) + 1, "file_name": name, "height": size[0], "width": size[1]} | more)
        return len(records)

    def box(image_id: int, bbox: list[float], category: int = 1, **more: Any) -> int:
        boxes.append(
            {"id": len(boxes) + 1, "image_id": image_id, "category_id": category, "bbox": bbox, "iscrowd": 0} | more
        )
        return len(boxes)

    for name in names:
        box(image(name), [10, 10, 30, 20])
    first = 1
    box(first, [50, 10, 30, 20], segmentation=[[50, 10, 80, 10, 80, 30]], area=111.0)
    box(first, [20, 20, 0, 10])  # 14: no area
    box(first, [500, 20, 10, 10])  # 15: outside
    box(first, [60, 60, -20, -10])  # 16: inverted
    box(first, [120, 10, 20, 20], area=400.0)  # 17: sticks out by 12
    box(first, [1, 1, 0.5, 8])  # 18: below a pixel
    box(first, [0, 0, 128, 96])  # 19: covers the image
    box(first, [10, 10, 30, 20])  # 20: that of 1, twice
    box(first, [50, 10, 30, 20], category=2)  # 21: that of 13 with another class
    box(first, [5, 5, 9, 9], category=77)  # 22: unknown category
    box(999, [5, 5, 9, 9])  # 23: unknown image
    box(2, [40, 40, 9, 9], id=1)  # 24: the id of another
    draw(images, "truncated.jpg", 20)
    whole = (images / "truncated.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "text.jpg").write_text("no image at all")
    draw(images, "turned.jpg", 21, (128, 96), exif=exif(6))
    draw(images, "mirrored.jpg", 22, exif=exif(2))
    deep = np.random.default_rng(0).integers(0, 1 << 16, SIZE).astype(np.uint16)
    cv2.imwrite(str(images / "deep.png"), deep)
    Image.fromarray(draw_image(np.random.default_rng(23), SIZE).image).convert("CMYK").save(images / "cmyk.jpg")
    draw(images, "small.jpg", 24, (48, 64))
    draw(images, "no_size.jpg", 25)
    shutil.copy(images / "good3.jpg", images / "copy.jpg")
    draw(images, "near.jpg", 4, quality=60)
    for name in (
        "truncated.jpg",
        "text.jpg",
        "absent.jpg",
        "turned.jpg",
        "mirrored.jpg",
        "deep.png",
        "cmyk.jpg",
        "small.jpg",
    ):
        box(image(name), [10, 10, 30, 20])
    box(image("no_size.jpg", height=0, width=0), [10, 10, 30, 20])
    box(image("copy.jpg"), [10, 10, 30, 20])
    box(image("near.jpg"), [10, 10, 30, 20])
    box(image("good5.jpg"), [40, 40, 20, 20])  # listed a second time
    box(image("../outside.jpg"), [10, 10, 30, 20])
    draw(images, "empty.jpg", 26)
    image("empty.jpg")
    categories = [{"id": 1, "name": "cell"}, {"id": 2, "name": "dust"}, {"id": 3, "name": "nobody"}]
    train = folder / "train.json"
    train.write_text(json.dumps({"images": records, "annotations": boxes, "categories": categories, "licence": "own"}))

    draw(images, "val.jpg", 40)
    shutil.copy(images / "good7.jpg", images / "leaked.jpg")
    draw(images, "leaked_near.jpg", 8, quality=55)
    val_names = ["val.jpg", "leaked.jpg", "leaked_near.jpg"]
    val_records = [
        {"id": number, "file_name": name, "height": SIZE[0], "width": SIZE[1]}
        for number, name in enumerate(val_names, 1)
    ]
    val_boxes = [
        {"id": number, "image_id": number, "category_id": 1, "bbox": [10, 10, 30, 20]} for number in range(1, 4)
    ]
    val_boxes.append({"id": 4, "image_id": 1, "category_id": 9, "bbox": [50, 50, 30, 20]})
    val = folder / "val.json"
    categories = [{"id": 1, "name": "cell"}, {"id": 9, "name": "ghost"}]
    val.write_text(json.dumps({"images": val_records, "annotations": val_boxes, "categories": categories}))
    return train, val, images
