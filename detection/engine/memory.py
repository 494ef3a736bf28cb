"""Memory that is full, and what a user can do about it."""

import contextlib
from collections.abc import Iterator

import torch

from backbones.errors import UserError
from detection.engine.config import TrainConfig


def is_full_memory(error: BaseException) -> bool:
    """Whether an error of torch's says that there is no memory left, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def what_was_too_much(error: BaseException) -> str:
    """The head of torch's message about full memory; the rest lists every process of the machine."""
    first = str(error).splitlines()[0]
    return ". ".join(first.split(". ")[:2]).rstrip(".")


@contextlib.contextmanager
def memory_advice(config: TrainConfig, *, evaluates: bool = False) -> Iterator[None]:
    """Turns torch's errors about full memory into a ``UserError`` that says which settings need less."""
    try:
        yield
    except RuntimeError as error:
        if not is_full_memory(error):
            raise
        half = max(config.batch_size // 2, 2)
        amp = "" if config.amp != "off" else ", compute in half precision (--train.amp bf16)"
        advice = (
            f"lower --train.batch-size (now {config.batch_size}; {half} with --train.accumulate {config.accumulate * 2} "
            f"takes steps over as many images), lower --model.input-size{amp}"
        )
        if evaluates:
            advice = "it was an evaluation: lower --data.val-batch-size"
        raise UserError(f"memory is full: {advice}. torch says: {what_was_too_much(error)}") from error
