"""Checkpoints: tensors and plain data, written whole or not at all, loaded strictly and without running code."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FORMAT = "litedet checkpoint"
VERSION = 1

_PLAIN_TYPES = (bool, int, float, str, type(None))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` beside ``path`` and renames it into place: a reader never meets half a file.

    Args:
        path: the file to write; an old one is replaced.
        content: nested dicts, lists and tuples of tensors and plain values (bool, int, float, str, None).

    Raises:
        TypeError: something else is in it; ``weights_only=True`` would refuse to load that.
    """
    _check_plain(content, "")
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        torch.save({"format": FORMAT, "version": VERSION, **content}, file)
        file.flush()
        os.fsync(file.fileno())  # on the disk before the name points to it, even if the power fails
    os.replace(temporary, path)


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote, with the tensors on ``device``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint of this project, is damaged, or has another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint file")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read: damaged, or another kind of file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} was not written by this project's training; expected a best.pt or last.pt of a run")
    if content["version"] != VERSION:
        raise ValueError(
            f"{path} has checkpoint format {content['version']}, this version of the project reads {VERSION}; "
            f"use the version that wrote it"
        )
    return content


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Copies ``weights`` into ``module``, all or none.

    Args:
        module: the network.
        weights: a state dict.
        source: where the weights come from, for the message.

    Raises:
        ValueError: names every tensor that is missing, not expected or of another shape.
    """
    own = module.state_dict()
    mismatches = [f"missing: {name} {list(tensor.shape)}" for name, tensor in own.items() if name not in weights]
    mismatches += [f"not expected: {name}" for name in weights if name not in own]
    mismatches += [
        f"{name}: expected shape {list(tensor.shape)}, given {list(weights[name].shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if mismatches:
        listed = "\n  ".join(mismatches)
        raise ValueError(
            f"{source} does not fit the network, {len(mismatches)} of {len(own)} tensors differ:\n  {listed}"
        )
    module.load_state_dict(weights)


def _check_plain(value: Any, place: str) -> None:
    if isinstance(value, Mapping):
        for key, entry in value.items():
            _check_plain(key, f"{place}[key {key!r}]")
            _check_plain(entry, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, entry in enumerate(value):
            _check_plain(entry, f"{place}[{i}]")
    # exact types: numpy's float64 is a float for isinstance, and is pickled as something that torch.load refuses
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN_TYPES:
        raise TypeError(
            f"a checkpoint holds tensors and plain data alone, not {type(value).__name__} at content{place}"
        )
