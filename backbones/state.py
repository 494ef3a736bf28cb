"""Files that are whole or not there, and state dicts that fit or are refused: once for everything that is saved and loaded."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

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
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # the first error says more
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(
            error.errno, f"cannot be written, the file before stays as it was: {reason}", str(path)
        ) from error


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """A line for every tensor of one state dict that is missing, not expected or of another shape in another."""
    lines = [f"missing: {name} {list(tensor.shape)}" for name, tensor in own.items() if name not in given]
    lines += [f"not expected: {name} {list(tensor.shape)}" for name, tensor in given.items() if name not in own]
    lines += [
        f"{name}: expected shape {list(tensor.shape)}, given {list(given[name].shape)}"
        for name, tensor in own.items()
        if name in given and given[name].shape != tensor.shape
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
        UserError: names every tensor that is missing, not expected or of another shape.
    """
    own = module.state_dict()
    lines = misfits(own, state)
    if lines:
        head = (
            f"{source} does not fit the network, nothing was loaded ({len(lines)} of {len(own)} tensors differ){hint}:"
        )
        raise UserError("\n  ".join([head, *lines]))
    module.load_state_dict(dict(state))
