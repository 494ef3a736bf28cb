"""Detections of very many images as Parquet shards, to be continued after a kill.

A shard is a range of the sorted list of images and is written whole or not at all, so which shards are there says what is done.
One row an image, also where nothing was found or the file cannot be read:

* ``image`` string, the path as found; ``width``, ``height`` int32, pixels as shown (turned by EXIF), null where unreadable;
* ``boxes`` list of float32[4], xyxy in these pixels; ``scores`` float32, ``labels`` int32, ``names`` string: lists of equal
  length, best first;
* ``error`` string: why it cannot be read; null where it can.
"""

import glob
import hashlib
import importlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from backbones.errors import UserError
from backbones.state import write_whole
from detection.data.dataset import DetectionDataset
from detection.engine.workers import BatchLoader
from detection.images.decode import IMAGE_SUFFIXES, read_image
from detection.images.place import place
from detection.inference.predictor import Predictor
from detection.models.detector import DetectorConfig
from detection.structures import Detections, Placement


def list_images(source: str) -> list[str]:
    """The images of a folder (with its subfolders), a pattern, or a text file with a path a line, sorted, each once.

    Raises:
        FileNotFoundError: nothing there.
        UserError: no image in it.
    """
    path = Path(source)
    if path.is_dir():
        paths = [
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(IMAGE_SUFFIXES)
        ]
    elif path.suffix.lower() == ".txt" and path.is_file():
        paths = [
            line.strip()
            for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
            if line.strip()
        ]
    elif glob.has_magic(source):
        paths = [one for one in glob.glob(source, recursive=True) if Path(one).suffix.lower() in IMAGE_SUFFIXES]
    elif path.is_file():
        paths = [source]
    else:
        raise FileNotFoundError(f"{source}: no such folder, pattern or list; a list is a .txt with a path on each line")
    if not paths:
        raise UserError(f"{source}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(set(paths))


def open_folder(out: Path, identity: dict[str, Any], *, alone: bool = False) -> None:
    """Makes the folder of results, or checks that it holds results of the same.

    Args:
        out: the folder.
        identity: what the results depend on; plain data.
        alone: no other process works in it, so what a killed one left half written is removed.

    Raises:
        UserError: the folder holds results of something else, and says of what.
    """
    manifest = out / "predict.json"
    if not manifest.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(manifest, (json.dumps(identity, indent=2) + "\n").encode())  # every process writes the same
        return
    was = json.loads(manifest.read_text())
    identity = json.loads(json.dumps(identity))  # tuples as they come back from the file
    changes = [name for name in identity if was.get(name) != identity[name]]
    if changes:
        told = "; ".join(f"{name} {was.get(name)!r} -> {identity[name]!r}" for name in changes)
        raise UserError(f"{out} holds detections of something else ({told}); take the same again, or another --out")
    for part in out.rglob("*.????????.part") if alone else ():
        part.unlink()


def legible(text: str) -> str:
    """A path or a message with one, as UTF-8 can hold it: bytes of a file name that are no text become ``\\xNN``."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def digest(paths: Sequence[str]) -> str:
    """sha256 of a list of paths."""
    return hashlib.sha256("\n".join(paths).encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Shards:
    """The list of images cut into ranges, each of which becomes a file.

    Attributes:
        paths: of the images, in the same order in every process.
        out: see ``open_folder``.
        size: images of a shard; the last one may have fewer.
    """

    paths: Sequence[str]
    out: Path
    size: int

    def __len__(self) -> int:
        return -(-len(self.paths) // self.size)

    def positions(self, shard: int) -> range:
        """Places of a shard's images in ``paths``."""
        return range(shard * self.size, min((shard + 1) * self.size, len(self.paths)))

    def file(self, shard: int) -> Path:
        return self.out / f"shard-{shard:06}.parquet"

    def missing(self, rank: int = 0, world_size: int = 1) -> list[int]:
        """Numbers of the shards of a process that are not there yet: it takes every ``world_size``-th."""
        there = {path.name for path in self.out.glob("shard-*.parquet")}  # one listing: asking for each takes longer
        return [shard for shard in range(rank, len(self), world_size) if self.file(shard).name not in there]

    def write(self, shard: int, rows: list[dict[str, Any]]) -> None:
        """Write a shard, whole or not at all; a row as ``row_of`` makes it for each of its images.

        Raises:
            UserError: pyarrow is not installed.
            OSError: it cannot be written.
        """
        arrow, parquet = require_arrow()
        if len(rows) != len(self.positions(shard)):
            raise ValueError(f"shard {shard} has {len(self.positions(shard))} images, {len(rows)} rows are given")
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows, schema=rows_schema(arrow)), buffer)
        write_whole(self.file(shard), buffer.getvalue())

    def rows(self, shard: int, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The rows of a shard that is there, or some of their columns."""
        _, parquet = require_arrow()
        rows: list[dict[str, Any]] = parquet.read_table(self.file(shard), columns=columns).to_pylist()
        return rows

    def unreadable(self) -> list[str]:
        """Why each image of the shards so far that cannot be read cannot be."""
        there = set(range(len(self))) - set(self.missing())
        errors = (row["error"] for shard in sorted(there) for row in self.rows(shard, ["error"]))
        return [error for error in errors if error is not None]


def require_arrow() -> tuple[Any, Any]:
    """The modules pyarrow and pyarrow.parquet.

    Raises:
        UserError: the package is not installed.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("Parquet needs the package pyarrow; pip install 'litedet[predict]'") from error


class Item(NamedTuple):
    """An image on its way to the network.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, at the network's input size; zeros where it cannot be read.
        placement: where the image lies in ``pixels``.
        size: (height, width) of the image.
        error: why it cannot be read; "" where it can.
    """

    pixels: NDArray[np.uint8]
    placement: Placement
    size: tuple[int, int]
    error: str


class Images(Dataset[Item]):
    """Image files at the network's input size; by position in the list.

    Args:
        paths: of the files. They are taken as they are shown, turned by EXIF.
        config: of the detector.
        dataset: the same images as an annotation file has them. They are then taken in the pixels that its boxes count, which
            evaluation does too.
    """

    def __init__(self, paths: Sequence[str], config: DetectorConfig, dataset: DetectionDataset | None = None) -> None:
        self.paths, self.config, self.dataset = paths, config, dataset

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> Item:
        config = self.config
        try:
            image = self.dataset.image(position) if self.dataset else read_image(self.paths[position])
        except (OSError, ValueError) as error:
            nothing = np.zeros((*config.input_size, 3), np.uint8)
            return Item(nothing, Placement(1.0, 1.0, 0.0, 0.0), (0, 0), str(error))
        pixels, placement = place(image, config.input_size, config.resize, config.fill)
        return Item(pixels, placement, (image.shape[0], image.shape[1]), "")


class Items(NamedTuple):
    """A batch of images, those that cannot be read included.

    Attributes:
        pixels: uint8 [B, 3, H, W], channels-last in memory.
        placements: float32 [B, 4].
        sizes: int64 [B, 2], (height, width).
        errors: why each cannot be read; "" where it can.
    """

    pixels: Tensor
    placements: Tensor
    sizes: Tensor
    errors: list[str]


def stack(items: Sequence[Item]) -> Items:
    return Items(
        torch.from_numpy(np.stack([item.pixels for item in items])).permute(0, 3, 1, 2),
        torch.tensor([item.placement for item in items], dtype=torch.float32),
        torch.tensor([item.size for item in items], dtype=torch.int64),
        [item.error for item in items],
    )


def detect_rows(predictor: Predictor, items: Items) -> list[dict[str, Any]]:
    """What is found in each of a batch of images, as rows of a shard that lack the column ``image``."""
    good = [row for row, error in enumerate(items.errors) if not error]
    if len(good) == len(items.errors):
        found = predictor.detect(items.pixels, items.placements, items.sizes)
    else:
        found = predictor.detect(items.pixels[good], items.placements[good], items.sizes[good])
    rows: list[dict[str, Any]] = [{"error": legible(error) or None} for error in items.errors]
    for row, one in zip(good, found, strict=True):
        rows[row] |= row_of(one, items.sizes[row].tolist())
    return rows


def predict_shards(
    predictor: Predictor,
    shards: Shards,
    images: Images,
    *,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Writes the shards of this process that are not there yet.

    Args:
        predictor: with the thresholds wanted.
        shards: of all processes.
        images: of all processes.
        batch_size: images that the network gets at once.
        workers: processes that decode; 0: this one.
        rank, world_size: this process takes every ``world_size``-th of all shards, so the others may die.

    Yields:
        The number of images of each batch done.

    Raises:
        UserError: pyarrow is not installed; a worker was killed.
    """
    require_arrow()
    missing = shards.missing(rank, world_size)
    # One loader over all shards, so that the workers start once and never wait at the end of a shard.
    positions = [position for shard in missing for position in shards.positions(shard)]
    if not positions:
        return
    loader: BatchLoader[Items] = BatchLoader(
        images,
        sampler=positions,  # type: ignore[arg-type]  # torch takes any iterable with a length
        batch_size=batch_size,
        num_workers=workers,
        collate=stack,
    )
    rows: list[dict[str, Any]] = []
    done = 0
    for items in loader:
        for row in detect_rows(predictor, items):
            rows.append({"image": legible(shards.paths[positions[done]]), **row})
            done += 1
        while missing and len(rows) >= len(shards.positions(missing[0])):
            shard = missing.pop(0)
            count = len(shards.positions(shard))
            shards.write(shard, rows[:count])
            del rows[:count]
        yield len(items.errors)


def row_of(found: Detections, size: Sequence[int]) -> dict[str, Any]:
    """The columns of an image of (height, width), but for its path."""
    return {
        "height": size[0],
        "width": size[1],
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
        "names": found.names(),
    }


def rows_schema(arrow: Any) -> Any:
    """The columns of a shard, as the arrow schema of the module ``pyarrow``."""
    return arrow.schema(
        [
            ("image", arrow.string()),
            ("width", arrow.int32()),
            ("height", arrow.int32()),
            ("boxes", arrow.list_(arrow.list_(arrow.float32(), 4))),
            ("scores", arrow.list_(arrow.float32())),
            ("labels", arrow.list_(arrow.int32())),
            ("names", arrow.list_(arrow.string())),
            ("error", arrow.string()),
        ]
    )
