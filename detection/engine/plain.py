"""Typed configs as plain data: what json and a checkpoint hold."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

import msgspec

from backbones.errors import UserError

Config = TypeVar("Config")


def to_plain(config: object) -> dict[str, Any]:
    """A config as dicts, lists, numbers and texts, fit for json and for a checkpoint."""
    plain: dict[str, Any] = msgspec.to_builtins(config, enc_hook=_path_to_text)
    return plain


Kinds = Mapping[type, Callable[[Mapping[str, Any]], type]]
"""Base class of configs -> what tells from a plain config which of its dataclasses it is."""


def from_plain(plain: object, config_type: type[Config], kinds: Kinds | None = None, source: str | Path = "") -> Config:
    """The inverse of ``to_plain``, for what this version wrote and versions before it.

    A field that the file does not have gets its default. A field that the class does not know is refused, unless the class
    says what became of it in ``renamed_fields`` (old name -> new name; None for a field that was dropped and whose value
    changes nothing any more). The table stays for good: an old name never comes back with another meaning.

    Args:
        plain: dicts, lists, numbers and texts.
        config_type: the dataclass.
        kinds: for fields whose type is the base class of several dataclasses.
        source: the file, for the message.

    Raises:
        UserError: an unknown field, or a value of another type than the field; the message names file and field.
    """
    kinds = kinds or {}

    def other(wanted: type, value: Any) -> Any:
        if issubclass(wanted, Path):
            return Path(value)
        if wanted in kinds:
            if not isinstance(value, Mapping):
                raise TypeError(
                    f"Expected `object`, got `{type(value).__name__}`"
                )  # as msgspec says it, which adds the place
            return msgspec.convert(value, kinds[wanted](value), dec_hook=other, strict=False)
        raise NotImplementedError(f"cannot read a {wanted.__name__}")

    where = f"{source}: " if source else ""
    try:
        known = _with_todays_names(plain, config_type, kinds, "")
        return msgspec.convert(known, config_type, dec_hook=other, strict=False)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}this is no {config_type.__name__}: {error}") from error
    except UserError as error:
        raise UserError(f"{where}{error}") from error


def _with_todays_names(value: Any, wanted: Any, kinds: Kinds, place: str) -> Any:
    """A plain value whose fields have the names that they have today; ``place`` is its dotted name."""
    if not isinstance(value, Mapping):
        return value
    choices = [wanted, *get_args(wanted)]  # the dataclass itself, or within Optional
    wanted = next((choice for choice in choices if choice in kinds or is_dataclass(choice)), None)
    if wanted in kinds:
        wanted = kinds[wanted](value)
    if not isinstance(wanted, type) or not is_dataclass(wanted):
        return value
    types = get_type_hints(wanted)
    today = {field.name for field in fields(wanted)}
    renamed: Mapping[str, str | None] = getattr(wanted, "renamed_fields", {})
    result: dict[str, Any] = {}
    for name, inner in value.items():
        new = name if name in today else renamed.get(name, name)
        if new is None:
            continue
        dotted = f"{place}.{name}" if place else str(name)
        if new not in today:
            raise UserError(
                f"unknown field {dotted} of {wanted.__name__}; it was written by another version of this project, or by hand"
            )
        if new in result:
            raise UserError(f"{dotted} is there twice, under its name of before and as {new}")
        result[new] = _with_todays_names(inner, types[new], kinds, dotted)
    return result


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
