"""Annotation files and images made by chance (Hypothesis): a right answer or a clear error, whatever is in them."""

import json
import math
import os
import struct
import subprocess
import sys
import zlib
from io import BytesIO
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

ROOT = Path(__file__).resolve().parents[1]

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


def chunk_of_png(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    header = chunk_of_png(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk_of_png(b"IDAT", pixels) + chunk_of_png(b"IEND", b"")


def jpeg_of(width: int, height: int) -> bytes:
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    content = bytearray(file.getvalue())
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 66, 0, 0, 54) + header + bytes(12)


def tiff_of(**changed: tuple[int, int]) -> bytes:
    """16 x 16 grey pixels; ``t256=(count, value)`` changes a tag."""
    tags = {256: 16, 257: 16, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 16, 279: 256}
    content = b"II*\0" + struct.pack("<IH", 8, len(tags))
    for tag, value in tags.items():
        content += struct.pack("<HHII", tag, 4, *changed.get(f"t{tag}", (1, value)))
    return content + bytes(400)


MUCH = 2**31 - 1
CLAIMS = {
    "area.png": png_of(MUCH, MUCH),
    "line.png": png_of(MUCH, 1),
    "empty.png": png_of(13_000, 13_000, zlib.compress(bytes(1000))),  # below the limit, but where are the pixels?
    "area.jpg": jpeg_of(65_535, 65_535),
    "area.bmp": bmp_of(MUCH, MUCH),
    "turned.bmp": bmp_of(100, -MUCH),
    "empty.bmp": bmp_of(13_000, 13_000),
    "area.ppm": b"P6\n1000000000 1000000000\n255\n\0\0\0",
    "digits.ppm": b"P6\n" + b"9" * 1_000_000 + b" 16\n255\n",
    "area.tif": tiff_of(t256=(1, MUCH), t257=(1, MUCH)),
    "counts.tif": tiff_of(t258=(2**32 - 1, 100), t273=(2**32 - 1, 100), t279=(2**32 - 1, 100)),
    "rows.tif": tiff_of(t278=(1, MUCH), t279=(1, MUCH)),
}


def compressed_zeros(num_mib: int) -> bytes:
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(num_mib)) + packer.flush()


_READ_ALL = """
import resource, sys
from detection.images.decode import UnreadableImageError, read_image
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = most()
for path in sys.argv[1:]:
    try:
        print(*read_image(path).shape)
    except UnreadableImageError as error:
        print(error)
print(most() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the most memory that a process had is told on POSIX")
def test_headers_that_claim_much_take_no_memory(tmp_path: Path) -> None:
    """Nor do a comment and a colour profile of a quarter of a gigabyte of zeros, in a good image."""
    content, zeros = png_of(1, 1, zlib.compress(bytes(4))), b"a\0\0" + compressed_zeros(256)
    texts = chunk_of_png(b"zTXt", zeros) + chunk_of_png(b"iCCP", zeros)
    files = CLAIMS | {"texts.png": content[:33] + texts + content[33:]}
    for name, file in files.items():
        (tmp_path / name).write_bytes(file)
    command = [sys.executable, "-c", _READ_ALL, *(str(tmp_path / name) for name in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, cwd=ROOT)
    *answers, num_mib = done.stdout.splitlines()
    assert dict(zip(files, answers, strict=True)).pop("texts.png") == "1 1 3"
    for name, answer in zip(CLAIMS, answers, strict=False):
        assert answer.startswith(f"{tmp_path / name}: the image "), answer
    assert int(num_mib) < 100
