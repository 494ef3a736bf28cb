"""Annotation files and images made by chance (Hypothesis): a right answer or a clear error, whatever is in them."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from backbones.errors import UserError
from detection.data.coco import CocoIndex
from detection.data.formats.voc import convert_voc
from detection.data.formats.yolo import convert_yolo, corners_of_row
from detection.images.decode import UnreadableImageError, read_image

# The same examples in every run: a gate must not fail by chance. LITEDET_EXAMPLES=20000 is a search with others.
EXAMPLES = int(os.environ.get("LITEDET_EXAMPLES", 100))
bounded = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

numbers = st.one_of(
    st.integers(-3, 70),
    st.floats(-100, 100),
    st.sampled_from([0, -0.0, 1e-320, 1e308, -1e308, 2**31, 2**63, -(2**63) - 1, 10**400]),
)
plain = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
GOOD: dict[str, Any] = {
    "info": {},
    "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}, {"id": 7, "file_name": "b.jpg", "width": 9,
                                                                            "height": 9}],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 2, 30, 40], "area": 1200, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 3, "bbox": [0.5, 0.5, 3, 4]},
    ],
    "categories": [{"id": 3, "name": "cat"}],
}  # fmt: skip
XML = b"""<annotation><filename>a.jpg</filename><size><width>60</width><height>40</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>2</xmin><ymin>3</ymin><xmax>20</xmax><ymax>30</ymax>
</bndbox></object></annotation>"""


@st.composite
def changed_coco(draw: st.DrawFn) -> Any:
    """A good file with up to three values at any depth replaced, removed or doubled."""
    content = json.loads(json.dumps(GOOD))
    for _ in range(draw(st.integers(1, 3))):
        place: Any = content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(place[key], (dict, list)) and draw(st.booleans()):
                place = place[key]
                continue
            action = draw(st.sampled_from(["replace", "number", "remove", "double"]))
            if action == "remove":
                del place[key]
            elif action == "double" and isinstance(place, list):
                place.append(place[key])
            else:
                place[key] = draw(numbers if action == "number" else plain)
            break
    return content


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with bytes changed, put in or cut off."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(changed) - 1, 0)))
        new = draw(st.binary(max_size=4))
        changed[place : place + draw(st.integers(0, 4))] = new
    return bytes(changed[: draw(st.integers(0, len(changed)))] if draw(st.integers(0, 3)) == 0 else changed)


def check_index(path: Path) -> bool:
    """Whether the file is read; then all that training takes from it is sound."""
    try:
        index = CocoIndex.read(path, cache=False)
    except UserError as error:
        assert str(path) in str(error)  # noqa: PT017
        return False
    assert len(index.offsets) == len(index) + 1
    for position in range(len(index)):
        height, width = index.size(position)
        index.file_name(position)
        objects = index.objects(position, usable_only=True)
        assert np.isfinite(objects.boxes).all()
        assert (objects.boxes[:, 2:] > objects.boxes[:, :2]).all()
        assert (objects.boxes[:, :2] < (width, height)).all()
        assert (objects.boxes[:, 2:] > 0).all()
        assert ((objects.labels >= 0) & (objects.labels < index.num_classes)).all()
    return True


def test_coco_with_changed_values(tmp_path: Path) -> None:
    path, read = tmp_path / "a.json", []

    @bounded
    @given(changed_coco())
    def check(content: Any) -> None:
        path.write_text(json.dumps(content))
        read.append(check_index(path))

    check()
    assert {True, False} <= set(read)  # both ways are taken


def test_coco_with_changed_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    @bounded
    @given(changed_bytes(json.dumps(GOOD).encode()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        check_index(path)

    check()


@pytest.mark.parametrize("opening", ["", '{"a":', '{"info":', '{"images":'])
def test_json_nested_a_million_deep(tmp_path: Path, opening: str) -> None:
    (tmp_path / "a.json").write_text(opening + "[" * 1_000_000)
    assert not check_index(tmp_path / "a.json")


@bounded
@given(
    st.one_of(
        st.text(max_size=60),
        st.lists(st.one_of(numbers.map(str), st.sampled_from(["nan", "inf", "-inf", "1e999", "0x1", "1_0", "٣"])),
                 max_size=12).map(" ".join),
    ),
    st.sampled_from([None, 4, 51]),
)  # fmt: skip
def test_a_row_of_yolo(row: str, num_key_values: int | None) -> None:
    found = corners_of_row(row, num_key_values)
    if found is not None:
        label, (x1, y1, x2, y2), _ = found
        assert isinstance(label, int)
        assert not any(math.isnan(value) for value in (x1, y1, x2, y2))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "images" / "a.jpg")
    return tmp_path / "images"


def test_yolo_with_changed_bytes(tmp_path: Path, images: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "names.txt").write_text("cat\ndog\n")

    @bounded
    @given(changed_bytes(b"0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.3 0.1 0.2 0.4\n"))
    def check(content: bytes) -> None:
        (tmp_path / "labels" / "a.txt").write_bytes(content)
        try:
            convert_yolo(images, tmp_path / "labels", tmp_path / "names.txt", tmp_path / "out.json")
        except UserError:
            return
        assert check_index(tmp_path / "out.json")

    check()


def test_voc_with_changed_bytes(tmp_path: Path, images: Path) -> None:
    (tmp_path / "xml").mkdir()

    @bounded
    @given(changed_bytes(XML))
    def check(content: bytes) -> None:
        (tmp_path / "xml" / "a.xml").write_bytes(content)
        try:
            convert_voc(tmp_path / "xml", images, tmp_path / "out.json")
        except UserError:
            return
        assert check_index(tmp_path / "out.json")

    check()


def test_voc_with_entities(tmp_path: Path, images: Path) -> None:
    """A thousand million words from ten lines, and a file of the machine, stay where they are."""
    (tmp_path / "xml").mkdir()
    (tmp_path / "secret").write_text("secret")
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    for kind in (f'<!ENTITY e0 "word">{levels}', f'<!ENTITY e9 SYSTEM "{(tmp_path / "secret").as_uri()}">'):
        content = f"<!DOCTYPE a [{kind}]>" + XML.decode().replace("cat", "&e9;")
        (tmp_path / "xml" / "a.xml").write_text(content)
        with pytest.raises(UserError):
            convert_voc(tmp_path / "xml", images, tmp_path / "out.json")
        assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp", "ppm"])
def test_an_image_with_changed_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)).save(path, exif=exif)
    good = path.read_bytes()
    read_image(path)

    @settings(bounded, max_examples=EXAMPLES * 3 // 5)
    @given(changed_bytes(good))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        try:
            image = read_image(path, max_pixels=1_000_000)
        except UnreadableImageError as error:
            assert str(path) in str(error)  # noqa: PT017
            return
        assert image.dtype == np.uint8
        assert image.ndim == 3
        assert image.shape[2] == 3
        assert 0 < image.size <= 3_000_000

    check()
