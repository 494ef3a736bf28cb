"""Typed configs as plain data: what json and a checkpoint hold."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec

from backbones.errors import UserError

Config = TypeVar("Config")


def to_plain(config: object) -> dict[str, Any]:
    """A config as dicts, lists, numbers and texts, fit for json and for a checkpoint."""
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=_path_to_text)
    return plain


Kinds = Mapping[type, Callable[[Mapping[str, Any]], type]]
"""Base class of configs -> what tells from a plain config which of its dataclasses it is."""


def from_plain(plain: object, config_type: type[Config], kinds: Kinds | None = None) -> Config:
    """The inverse of ``to_plain``.

    Args:
        plain: dicts, lists, numbers and texts.
        config_type: the dataclass.
        kinds: for fields whose type is the base class of several dataclasses.

    Raises:
        UserError: a value has another type than the field, which the message names.
    """

    def other(wanted: type, value: Any) -> Any:
        if issubclass(wanted, Path):
            return Path(value)
        if wanted in (kinds or {}):
            return from_plain(value, (kinds or {})[wanted](value), kinds)
        raise NotImplementedError(f"cannot read a {wanted.__name__}")

    try:
        return msgspec.convert(plain, config_type, dec_hook=other, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"this is no {config_type.__name__}: {error}") from error


class Change(NamedTuple):
    """A field in which two configs differ.

    Attributes:
        name: dotted.
        was, now: the values; where a part of the config is of another type, its whole.
    """

    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} {self.now}"


def differences(before: Any, after: Any, prefix: str = "") -> list[Change]:
    """The fields of two configs of one type that differ."""
    found = []
    for name in (field.name for field in fields(before)):
        old, new = getattr(before, name), getattr(after, name)
        if is_dataclass(old) and type(old) is type(new):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append(Change(f"{prefix}{name}", old, new))
    return found


def _path_to_text(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    raise NotImplementedError(f"a config must not hold a {type(value).__name__}")
