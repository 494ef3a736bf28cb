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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from backbones.errors import UserError
from backbones.state import write_whole
from detection.images.decode import IMAGE_SUFFIXES, read_image
from detection.images.place import place
from detection.inference.predictor import Predictor
from detection.inference.runners import threads_for
from detection.models.detector import DetectorConfig
from detection.structures import Detections, Placement, run_in_parts


def list_images(source: str) -> list[str]:
    """The images of a folder (with its subfolders), a pattern, or a text file with a path a line, sorted, each once.

    Raises:
        FileNotFoundError: nothing there.
        UserError: no image in it.
    """
    path = Path(source)
    if path.is_dir():
        paths = [str(one) for one in path.rglob("*") if one.suffix.lower() in IMAGE_SUFFIXES and one.is_file()]
    elif path.suffix.lower() == ".txt" and path.is_file():
        paths = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    elif glob.has_magic(source):
        paths = [one for one in glob.glob(source, recursive=True) if Path(one).suffix.lower() in IMAGE_SUFFIXES]
    elif path.is_file():
        paths = [source]
    else:
        raise FileNotFoundError(f"{source}: no such folder, pattern or list; a list is a .txt with a path on each line")
    if not paths:
        raise UserError(f"{source}: no image in it ({', '.join(IMAGE_SUFFIXES)})")
    return sorted(set(paths))


def open_folder(out: Path, identity: dict[str, Any]) -> None:
    """Makes the folder of results, or checks that it holds results of the same.

    Args:
        out: the folder.
        identity: what the results depend on; plain data.

    Raises:
        UserError: the folder holds results of something else, and says of what.
    """
    manifest = out / "predict.json"
    if not manifest.exists():
        out.mkdir(parents=True, exist_ok=True)
        write_whole(manifest, (json.dumps(identity, indent=2) + "\n").encode())  # every process writes the same
        return
    was = json.loads(manifest.read_text())
    changes = [name for name in identity if was.get(name) != identity[name]]
    if changes:
        told = "; ".join(f"{name} {was.get(name)!r} -> {identity[name]!r}" for name in changes)
        raise UserError(f"{out} holds detections of something else ({told}); take the same again, or another --out")


def digest(paths: Sequence[str]) -> str:
    """sha256 of a list of paths."""
    return hashlib.sha256("\n".join(paths).encode(errors="surrogateescape")).hexdigest()


def shard_path(out: Path, shard: int) -> Path:
    return out / f"shard-{shard:06}.parquet"


def missing_shards(out: Path, num_images: int, shard_size: int, rank: int = 0, world_size: int = 1) -> list[int]:
    """Numbers of the shards of a process that are not there yet."""
    count = -(-num_images // shard_size)
    return [shard for shard in range(rank, count, world_size) if not shard_path(out, shard).exists()]


class _Item(NamedTuple):
    pixels: NDArray[np.uint8] | None
    placement: Placement | None
    size: tuple[int, int] | None
    error: str | None


class _Images(Dataset[_Item]):
    def __init__(self, paths: Sequence[str], config: DetectorConfig) -> None:
        self.paths, self.config = paths, config

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> _Item:
        try:
            image = read_image(self.paths[position])
        except (OSError, ValueError) as error:
            return _Item(None, None, None, str(error))
        pixels, placement = place(image, self.config.input_size, self.config.resize, self.config.fill)
        return _Item(pixels, placement, (image.shape[0], image.shape[1]), None)


class _Stacked(NamedTuple):
    pixels: Tensor
    placements: Tensor
    sizes: Tensor
    errors: list[str | None]


def _stack(items: list[_Item]) -> _Stacked:
    good = [item for item in items if item.error is None]
    arrays = [item.pixels for item in good if item.pixels is not None]
    pixels = np.stack(arrays) if arrays else np.zeros((0, 1, 1, 3), np.uint8)
    return _Stacked(
        torch.from_numpy(pixels),
        torch.tensor([item.placement for item in good], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([item.size for item in good], dtype=torch.int64).reshape(-1, 2),
        [item.error for item in items],
    )


def predict_shards(
    predictor: Predictor,
    paths: Sequence[str],
    out: Path,
    *,
    shard_size: int,
    batch_size: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[int]:
    """Writes the shards of this process that are not there yet.

    Args:
        predictor: with the thresholds wanted.
        paths: of all processes, in the same order.
        out: see ``open_folder``.
        shard_size: images a shard.
        batch_size: images that the network gets at once.
        workers: processes that decode; 0: this one.
        rank, world_size: this process takes every ``world_size``-th of all shards, so the others may die.

    Yields:
        The number of images of each batch done.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        arrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError("Parquet needs the package pyarrow; pip install 'litedet[predict]'") from error
    missing = missing_shards(out, len(paths), shard_size, rank, world_size)
    todo = [path for shard in missing for path in paths[shard * shard_size : (shard + 1) * shard_size]]
    # One loader over all shards, so that the workers start once and never wait at the end of a shard.
    loader = DataLoader(
        _Images(todo, predictor.info.model), batch_size=batch_size, num_workers=workers, collate_fn=_stack
    )
    sizes = [len(paths[shard * shard_size : (shard + 1) * shard_size]) for shard in missing]
    rows: list[dict[str, Any]] = []
    done = 0
    for batch in loader:
        found = iter(_detect(predictor, batch))
        shapes = iter(batch.sizes.tolist())
        for reason in batch.errors:
            row: dict[str, Any] = {"image": todo[done], "error": reason}
            done += 1
            rows.append(row if reason is not None else {**row, **_row(next(found), next(shapes))})
        while sizes and len(rows) >= sizes[0]:
            table = arrow.Table.from_pylist(rows[: sizes[0]], schema=_schema(arrow))
            buffer = io.BytesIO()
            parquet.write_table(table, buffer)
            write_whole(shard_path(out, missing[-len(sizes)]), buffer.getvalue())
            del rows[: sizes.pop(0)]
        yield len(batch.errors)


def _detect(predictor: Predictor, batch: _Stacked) -> list[Detections]:
    if not len(batch.pixels):
        return []
    with torch.inference_mode(), threads_for(predictor.runner):
        pixels = batch.pixels.permute(0, 3, 1, 2).to(predictor.device)
        return predictor.postprocess(run_in_parts(predictor.runner, pixels), batch.placements, batch.sizes)


def _row(found: Detections, size: list[int]) -> dict[str, Any]:
    return {
        "height": size[0],
        "width": size[1],
        "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(),
        "labels": found.labels.tolist(),
        "names": found.names(),
    }


def _schema(arrow: Any) -> Any:
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


def unreadable(out: Path) -> list[str]:
    """The reason of every image of the shards so far that cannot be read."""
    parquet: Any = importlib.import_module("pyarrow.parquet")
    columns = (parquet.read_table(path, columns=["error"])["error"] for path in sorted(out.glob("shard-*.parquet")))
    return [reason for column in columns for reason in column.to_pylist() if reason is not None]
