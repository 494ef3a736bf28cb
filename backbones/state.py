"""Files that are whole or not there, and state dicts that fit or are refused: once for everything that is saved and loaded."""

import contextlib
import glob
import hashlib
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from backbones.errors import UserError


def write_whole(path: str | Path, content: bytes | memoryview, *, durable: bool = False) -> None:
    """Write a file so that a reader meets the old content or the new one, never a part.

    Args:
        path: the file; its folder is made if it is not there. The file is readable to whom the umask lets.
        content: all of it.
        durable: wait until it is on the disk before the name points to it, so that a power failure loses nothing.

    Raises:
        OSError: it cannot be written (full disk, no permission); it names ``path``, and nothing is left behind.
    """
    with writing_whole(path, durable=durable) as file:
        file.write(content)


@contextlib.contextmanager
def writing_whole(path: str | Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """``write_whole`` for who writes a file in pieces: it gets its name when the context ends, if no error ends it."""
    path = Path(path)
    _refuse_null(path)
    # A name of its own: two processes that write the same file at once must not write into the same beginning of it.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        with contextlib.suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot be written, the file before stays as it was: {reason}", str(path)
        ) from error


def remove_unfinished(path: str | Path) -> None:
    """Remove what ``write_whole`` of this path left when its process was killed (kill -9) at work.

    For who knows that no other process writes the file just now: its write would fail.
    """
    path = Path(path)
    for other in path.parent.glob(f"{glob.escape(path.name)}.????????.part"):
        other.unlink(missing_ok=True)


def existing_file(path: str | Path, what: str = "a weights file") -> Path:
    """The path of a file that is there and can be read to its end.

    Args:
        path: of the file.
        what: what is expected, for the message: "is a folder, not ...".

    Raises:
        FileNotFoundError: it does not exist, or is a folder.
        UserError: it is empty, no regular file (a pipe would be waited for without end), or its name cannot be a path.
        OSError: the folders before it cannot be searched, or the name is too long.
    """
    path = Path(path)
    _refuse_null(path)
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{path} does not exist; {what} was expected") from error
    if stat.S_ISDIR(status.st_mode):
        raise FileNotFoundError(f"{path} is a folder, not {what}")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is a pipe or a device, not {what}; copy its content to a file")
    if not status.st_size:
        raise UserError(f"{path} is empty, not {what}")
    return path


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_plain(
    path: str | Path, device: torch.device | str = "cpu", what: str = "a weights file", *, mapped: bool = False
) -> Any:
    """What ``torch.save`` wrote, if it is tensors and plain data; no code that a file may hold is run.

    Args:
        path: of the file.
        device: where the tensors go.
        what: what is expected, for the message.
        mapped: read a tensor when it is looked at, for who wants the plain data alone.

    Raises:
        FileNotFoundError, OSError: see ``existing_file``, or it cannot be read.
        UserError: it is damaged, of another kind, holds something that only code can restore, or claims to unpack to far
            more than it is.
    """
    path = existing_file(path, what)
    with path.open("rb") as file:  # an OSError from here on is the file's content
        packed = file.read(2) == b"PK"
    try:
        if packed:
            _refuse_bomb(path)
        return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
    except UserError:
        raise
    except Exception as error:  # unpickling garbage raises nearly anything
        # Never torch's own text: it advises to load the file with its code.
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            reason = f"it holds a {found[1]}, which only code can restore, and code of a file is not run"
        else:
            reason = f"it is damaged, or another kind of file ({type(error).__name__})"
        raise UserError(f"{path} is not {what} that can be read: {reason}") from error


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """A line for every tensor of one state dict that is missing, not expected or of another kind in another."""
    lines = [f"missing: {name} {list(tensor.shape)}" for name, tensor in own.items() if name not in given]
    lines += [f"not expected: {name} {list(tensor.shape)}" for name, tensor in given.items() if name not in own]
    lines += [
        f"{name}: expected shape {list(tensor.shape)}, given {list(given[name].shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
    ]
    # A copy would turn one into the other in silence; how many bits a number has does not matter.
    lines += [
        f"{name}: expected {tensor.dtype}, given {given[name].dtype}"
        for name, tensor in own.items()
        if name in given
        and (tensor.is_floating_point(), tensor.is_complex())
        != (given[name].is_floating_point(), given[name].is_complex())
    ]
    return lines


def load_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path, hint: str = "") -> None:
    """Copy a state dict into a network, all of it or nothing.

    Args:
        module: the network.
        state: name -> tensor.
        source: where the tensors come from, for the message.
        hint: what the message says of the likely cause.

    Raises:
        UserError: names every tensor that is missing, not expected, of another shape, or integers for floats; or the first
            with an infinity or NaN in it, or a number too large for the network's dtype.
    """
    check_state(module, state, source, hint)
    module.load_state_dict(dict(state))


def check_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path, hint: str = "") -> None:
    """What ``load_state`` checks, alone. With a network on the meta device it costs no memory for tensors.

    Raises:
        UserError: as ``load_state``.
    """
    own = module.state_dict()
    lines = misfits(own, state)
    if lines:
        head = (
            f"{source} does not fit the network, nothing was loaded ({len(lines)} of {len(own)} tensors differ){hint}:"
        )
        raise UserError("\n  ".join([head, *lines]))
    # As the network will hold them: what is finite in float64 may be none in float32.
    damaged = [
        name
        for name, one in state.items()
        if one.is_floating_point() and not torch.isfinite(one.to(own[name].dtype)).all()
    ]
    if damaged:
        raise UserError(
            f"{source} holds values that are no finite numbers, in {len(damaged)} of {len(own)} tensors, and nothing was loaded: "
            f"{', '.join(damaged[:4])}{', ...' if len(damaged) > 4 else ''}. The file is damaged, or its training went wrong"
        )


def _refuse_null(path: Path) -> None:
    if "\0" in str(path):
        raise UserError(f"{str(path)!r} cannot be the name of a file: it holds a null character")


def _refuse_bomb(path: Path) -> None:
    """torch stores without compression: a file that unpacks to much more than it is was not written by it."""
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > 2 * path.stat().st_size + (1 << 20):
        raise UserError(f"{path} is compressed and would unpack to {unpacked} bytes; torch.save does not compress")
