"""The shards of ``detection.inference.folder`` made by a Ray cluster, in a pool of actors that hold detectors.

Where the detectors have GPUs, tasks on all cores decode for them; without GPUs each core decodes and detects. Ray Data moves the
images and takes up what a lost machine left. The shards are written here, by the process that started it, each when all its
images are back: what is there says what is done, as without Ray.
"""

import logging
from collections.abc import Iterator
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.inference.folder import Images, Items, Shards, detect_rows, legible, require_arrow, rows_schema, stack
from detection.inference.predictor import load_detector

_Columns = dict[str, NDArray[Any]]


def predict_on_ray(
    file: Path, options: dict[str, Any], shards: Shards, images: Images, *, batch_size: int, detectors: int | None
) -> Iterator[int]:
    """Writes the shards that are not there yet.

    Args:
        file: of the detector, where every machine of the cluster finds it.
        options: arguments of ``load_detector`` for it; "auto" as device is a GPU where the cluster has one.
        shards, images: as for ``predict_shards``; their files too are where every machine finds them.
        batch_size: images that a network gets at once.
        detectors: actors, each with a GPU or a CPU core of its own; None: one for each GPU, without GPUs one for each core.

    Yields:
        The number of images of each batch done.

    Raises:
        UserError: ray or pyarrow is not installed.
    """
    arrow, _ = require_arrow()
    try:
        ray: Any = import_module("ray")
        ray_data: Any = import_module("ray.data")
    except ImportError as error:
        raise UserError("--engine ray needs the package ray; pip install 'litedet[ray]'") from error
    missing = shards.missing()
    if not missing:
        return
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        resources = ray.cluster_resources()
        gpu = options["device"] != "cpu" and resources.get("GPU", 0) > 0
        number = detectors or max(int(resources["GPU" if gpu else "CPU"]), 1)
        ray_data.DataContext.get_current().enable_progress_bars = False
        # A block for each shard, so that the images of a shard travel together.
        blocks = [arrow.table({"position": np.array(shards.positions(shard))}) for shard in missing]
        reference = ray.put(images)
        found = ray_data.from_arrow(blocks)
        if gpu:
            found = found.map_batches(_decode, batch_size=batch_size, fn_kwargs={"images": reference}, num_cpus=1)
        found = found.map_batches(
            _Detector,
            batch_size=batch_size,
            fn_constructor_args=(str(file), {**options, "device": "cuda" if gpu else "cpu"}, reference),
            compute=ray_data.ActorPoolStrategy(size=number),
            **({"num_gpus": 1} if gpu else {"num_cpus": 1}),
        )
        yield from _collect(found.iter_batches(batch_size=None, batch_format="pyarrow"), shards, missing)
    finally:
        if started:
            ray.shutdown()


def _collect(tables: Iterator[Any], shards: Shards, missing: list[int]) -> Iterator[int]:
    """Writes each shard when its rows, which come in any order, are all there."""
    waiting: dict[int, dict[int, dict[str, Any]]] = {shard: {} for shard in missing}
    for table in tables:
        for row in table.to_pylist():
            position = row.pop("position")
            waiting[position // shards.size][position] = {"image": legible(shards.paths[position]), **row}
        for shard in [shard for shard, rows in waiting.items() if len(rows) == len(shards.positions(shard))]:
            rows = waiting.pop(shard)
            shards.write(shard, [rows[position] for position in shards.positions(shard)])
        yield len(table)
    if waiting:
        raise RuntimeError(f"the cluster ended without {len(waiting)} of {len(missing)} shards")


@lru_cache(1)
def _fetch(reference: Any) -> Images:
    """What is in Ray's store under a reference, once in each process."""
    images: Images = import_module("ray").get(reference)
    return images


def _decode(batch: _Columns, images: Any) -> _Columns:
    """Positions [B] -> the columns of ``Items``, pixels as [B, H, W, 3]; ``images`` is a reference to ``Images``."""
    source = _fetch(images)
    items = stack([source[int(position)] for position in batch["position"]])
    return {
        "position": batch["position"],
        "pixels": items.pixels.permute(0, 2, 3, 1).numpy(),
        "placement": items.placements.numpy(),
        "size": items.sizes.numpy(),
        "error": np.array(items.errors, object),
    }


class _Detector:
    """An actor: a detector with a GPU or a core of its own.

    Args:
        file, options: as for ``predict_on_ray``, of this machine.
        images: a reference to ``Images``, for batches that nobody has decoded.
    """

    def __init__(self, file: str, options: dict[str, Any], images: Any) -> None:
        self.predictor = load_detector(file, **options)
        self.images = images

    def __call__(self, batch: _Columns) -> Any:
        """Positions [B], or what ``_decode`` makes of them -> an arrow table of rows of shards, with their positions."""
        if "pixels" not in batch:
            batch = _decode(batch, self.images)
        arrow, _ = require_arrow()
        items = Items(
            torch.from_numpy(np.array(batch["pixels"])).permute(0, 3, 1, 2),  # a copy: Ray's memory is read-only
            torch.from_numpy(np.array(batch["placement"])),
            torch.from_numpy(np.array(batch["size"])),
            [str(error or "") for error in batch["error"]],
        )
        rows = detect_rows(self.predictor, items)
        schema = rows_schema(arrow).append(arrow.field("position", arrow.int64()))
        return arrow.Table.from_pylist(
            [{**row, "position": int(position)} for row, position in zip(rows, batch["position"], strict=True)],
            schema=schema.remove(schema.get_field_index("image")),
        )
