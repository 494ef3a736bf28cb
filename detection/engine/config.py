"""How to train, whatever is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from backbones.errors import UserError
from detection.engine.ema import EmaConfig
from detection.engine.optim import OptimConfig
from detection.engine.runtime import check_device

_NUM_NAMED_IMAGES = 5  # of the unreadable ones in the message that ends a run
_NUM_SKIPPED_OF_FEW = 5  # unreadable images that end no run, however few images there are (up to a fifth of them)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 25
    """Passes over the training images."""
    batch_size: int = 24
    """Images of a batch, over all processes together, so that the same recipe fits 1 GPU and 8: they take the steps that one
    process would."""
    accumulate: int = 1
    """Batches whose gradients are averaged for one step of the optimiser."""
    seed: int = 0
    """Everything random follows from it. 0 or above."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """Moving average of the weights."""
    amp: Literal["off", "bf16", "fp16"] = "off"
    """Precision of the forward pass. fp16 scales the loss and leaves out steps whose gradient overflows."""
    channels_last: bool = True
    """Memory format of the convolutions' weights; more than twice as fast on a CPU."""
    compile: bool = False
    """Compile the training step with torch.compile(fullgraph=True)."""
    sync_norm: bool = True
    """Batch norms see the images of all processes, so that these train what one does. It takes an exchange for each norm and
    step; off, each process normalises its own share of the batch, and weights differ. Without effect in one process."""
    eval_every: int = 1
    """Epochs between evaluations; the last epoch is always evaluated."""
    log_every: int = 20
    """Optimiser steps between readings of the losses. A reading makes the host wait for the device."""
    checkpoint_every_steps: int | None = None
    """Optimiser steps between writings of last.pt within an epoch; None writes it after each epoch alone (and after Ctrl-C
    and SIGTERM)."""
    checkpoint_every_minutes: float | None = None
    """Minutes after which last.pt is written within an epoch; None for no limit."""
    max_left_out: int = 10
    """Batches of the whole run that may be left out because their loss or gradient is infinite or not a number. One more
    ends the run. Their images are named when losses are read (log_every)."""
    max_skipped_share: float = 0.01
    """The run stops when more than this share of the training images cannot be read. In small datasets five images may be
    unreadable, but no more than a fifth of them; with 0 none may."""
    num_threads: int | None = None
    """Threads of torch's operators; None leaves torch's own choice."""
    deterministic: bool = False
    """On a GPU: let cuDNN and torch choose operators that give the same bits in every run with the same seed. It costs speed.
    torch warns of an operator that has none. On a CPU runs are equal as it is."""
    device: str = "auto"
    """Where to train: auto (a CUDA GPU where there is one, else the CPU), cpu, cuda, cuda:N or mps."""
    resume: bool = False
    """Go on with the run in the run folder, exactly where its last checkpoint was written. The network comes from its last.pt
    alone: the weights it once started from are not needed. A start that torchrun --max-restarts or Slurm repeats does so by
    itself, where there is a checkpoint."""

    def validate(self) -> None:
        """Raises UserError for a value that means nothing."""
        for name in ("epochs", "batch_size", "accumulate", "eval_every", "log_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} must be at least 1, not {getattr(self, name)}")
        if self.max_left_out < 0:
            raise UserError(f"train.max_left_out must be 0 or above, not {self.max_left_out}")
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise UserError(
                f"train.checkpoint_every_steps must be at least 1 or None, not {self.checkpoint_every_steps}"
            )
        if self.checkpoint_every_minutes is not None and not self.checkpoint_every_minutes > 0:
            raise UserError(
                f"train.checkpoint_every_minutes must be above 0 or None, not {self.checkpoint_every_minutes}"
            )
        if self.seed < 0:
            raise UserError(f"train.seed must be 0 or above, not {self.seed}")
        if self.batch_size == 1:
            raise UserError(
                "train.batch_size must be at least 2, not 1: batch norm learns nothing from a single image; to save memory "
                "lower the input size, to average over more images raise --train.accumulate"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise UserError(f"train.num_threads must be at least 1 or None, not {self.num_threads}")
        if not 0 <= self.max_skipped_share <= 1:
            raise UserError(f"train.max_skipped_share must be in 0 <= x <= 1, not {self.max_skipped_share}")
        check_device(self.device)
        self.optim.validate()
        self.ema.validate()

    def batch_size_per_process(self, world_size: int) -> int:
        """Images of a batch in one of ``world_size`` processes.

        Raises:
            UserError: the batch cannot be shared out evenly, or leaves single images.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"train.batch_size {self.batch_size} cannot be shared out evenly to {world_size} processes; "
                f"take a multiple of {world_size}"
            )
        share = self.batch_size // world_size
        if share == 1 and not (self.sync_norm and world_size > 1):
            raise UserError(
                f"train.batch_size {self.batch_size} leaves one image for each of {world_size} processes, and batch norm "
                f"learns nothing from a single image; take at least {2 * world_size}, or --train.sync-norm True"
            )
        return share

    def num_skipped_allowed(self, num_images: int) -> int:
        """How many of so many images may be unreadable: see ``max_skipped_share``."""
        if self.max_skipped_share == 0:
            return 0
        return max(int(self.max_skipped_share * num_images), min(_NUM_SKIPPED_OF_FEW, num_images // 5))

    def too_many_skipped(self, texts: Sequence[str], num: int, num_images: int, which: str) -> str:
        """The message that ends a run with too many images that cannot be read.

        Args:
            texts: "path: reason" of some of them.
            num: of all of them.
            num_images: readable ones included.
            which: "training" or "validation".
        """
        named = "; ".join(texts[:_NUM_NAMED_IMAGES])
        more = num - min(len(texts), _NUM_NAMED_IMAGES)
        return (
            f"{num} of {num_images} {which} images cannot be read, more than --train.max-skipped-share "
            f"{self.max_skipped_share:g} allows: {named}{f'; and {more} more' if more else ''}. Repair them, take them out, "
            f"or raise the share"
        )
