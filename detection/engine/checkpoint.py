"""Checkpoints: tensors and plain data, written whole or not at all, loaded strictly and without running code."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.errors import UserError
from backbones.state import load_plain, write_whole

FORMAT = "litedet checkpoint"
VERSION = 1

_PLAIN_TYPES = (bool, int, float, str, type(None))


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Writes ``content`` beside ``path`` and renames it into place: a reader never meets half a file.

    Args:
        path: the file to write; an old one is replaced.
        content: nested dicts, lists and tuples of tensors and plain values (bool, int, float, str, None).

    Raises:
        OSError: it cannot be written; the old one stays.
        TypeError: something else is in it; ``weights_only=True`` would refuse to load that.
    """
    _check_plain(content, "")
    # Through memory: torch answers a full disk with an exception that names neither the disk nor the file.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    write_whole(path, buffer.getbuffer(), durable=True)


def load_checkpoint(path: Path | str, device: torch.device | str = "cpu", *, mapped: bool = False) -> dict[str, Any]:
    """Reads what ``save_checkpoint`` wrote, with the tensors on ``device``.

    Args:
        path: the file.
        device: where to put the tensors.
        mapped: read a tensor when it is looked at, for who wants the plain data alone.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file is no checkpoint of this project, is damaged, or has another format version.
    """
    return check_checkpoint(load_plain(path, device, "a checkpoint", mapped=mapped), path)


def is_checkpoint(content: object) -> bool:
    """Whether the content of a file is a checkpoint of this project, of whatever version."""
    return isinstance(content, dict) and content.get("format") == FORMAT


def check_checkpoint(content: object, path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint that this version reads.

    Args:
        content: of the file.
        path: of the file, for the message.

    Raises:
        UserError: it is no checkpoint of this project, has another format version, or lacks what every checkpoint has.
    """
    if not isinstance(content, dict) or not is_checkpoint(content):
        raise UserError(f"{path} was not written by this project's training; expected a best.pt or last.pt of a run")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path} has checkpoint format {content.get('version')!r}, this version of the project reads {VERSION}; "
            f"use the version that wrote it"
        )
    return content


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
