"""Convert weights of other libraries to ours, a training's checkpoint to a small file of weights, and classifiers to theirs.

$ litedet convert-weights SOURCE OUT.safetensors
$ litedet convert-weights OURS.safetensors OUT.pth --to timm

SOURCE is a file, recognised by what is in it, or a published name (--list shows them): state dicts of torchvision and
timm, TensorFlow Lite classifiers, frozen graphs of ssdlite_mobilenet_v2, SSDLite checkpoints of
mmdetection, and the best.pt or last.pt of a training here.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro
from numpy.typing import NDArray

from backbones.errors import UserError
from detection.cli.outputs import refuse_overwrites
from detection.engine.errors import main_errors
from detection.images.decode import IMAGE_SUFFIXES, UnreadableImageError, read_image

if TYPE_CHECKING:  # what loads torch is imported when the command line is parsed
    from detection.classification.data import EvalTransform
    from detection.weights.recognition import Converted


@dataclass(kw_only=True, slots=True)
class ConvertConfig:
    source: Annotated[str, tyro.conf.Positional]
    """A weights file, or a published name."""
    out: Annotated[Path, tyro.conf.Positional]
    """The file to write: .safetensors, or .pth with --to."""
    to: Literal["litedet", "torchvision", "timm"] = "litedet"
    """In whose layout the result is."""
    class_names: str | None = None
    """Names of the classes for a source that has none: a text file with one a line, or the names with commas between."""
    statistics_from: Path | None = None
    """A folder of images like those the network is for, a few hundred. TensorFlow Lite files have their batch norms
    folded away; with these images the norms get their statistics again, so that the network can be trained on."""
    max_images: Annotated[int, tyro.conf.arg(aliases=["--max-pictures"])] = 256
    """So many of these images are used, evenly picked."""
    image_size: Annotated[int, tyro.conf.arg(aliases=["--picture-size"])] = 224
    """Side of these images for the network."""

    def validate(self) -> None:
        """Raises UserError for values that make no sense."""
        ending = ".safetensors" if self.to == "litedet" else ".pth"
        if self.out.suffix != ending:
            raise UserError(f"{self.out}: with --to {self.to} the result is a {ending} file; give it that ending")
        refuse_overwrites(
            {"the source": self.source, "--class-names": self.class_names, "--statistics-from": self.statistics_from},
            {"the result": self.out},
        )
        if self.max_images < 1 or self.image_size < 32:
            raise UserError("--max-images is at least 1 and --image-size at least 32")


@main_errors
def main(argv: Sequence[str] | None = None) -> Converted | None:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments == ["--list"]:
        print_published()
        return None
    config = tyro.cli(ConvertConfig, args=arguments, description=__doc__)
    config.validate()

    from detection.weights.hub import fetch, published
    from detection.weights.recognition import convert

    entry = None if Path(config.source).exists() else published().get(config.source)
    path = fetch(config.source) if entry is not None else Path(config.source)
    images = None
    if config.statistics_from is not None:
        images = sample_images(config.statistics_from, config.max_images, config.image_size)
    try:
        converted = convert(path, read_class_names(config.class_names), images)
    except ImportError as error:
        raise UserError(str(error)) from error
    if entry is not None:
        converted.info.source = f"{entry.url}; {converted.info.source}"
        converted.info.licence = entry.licence
    if config.to == "litedet":
        converted.save(config.out)
    else:
        _save_theirs(converted, config.to, config.out)
    print(f"{config.source}: {converted.layout}")
    print("\n".join(f"  {line}" for line in converted.describe()))
    print(f"written: {config.out}")
    return converted


def sample_images(folder: Path, number: int, size: int) -> Iterator[NDArray[np.uint8]]:
    """Images of a folder and the folders in it, the middle of each as uint8 [size, size, 3].

    Raises:
        FileNotFoundError: no such folder.
        UserError: no images in it.
    """
    from detection.classification.config import TransformConfig
    from detection.classification.data import EvalTransform

    if not folder.is_dir():
        raise FileNotFoundError(f"--statistics-from {folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise UserError(f"--statistics-from {folder} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    picked = np.unique(np.linspace(0, len(files) - 1, min(number, len(files))).round().astype(int))
    return _read(picked.tolist(), files, EvalTransform(TransformConfig(eval_size=size)))


def _read(picked: list[int], files: list[Path], transform: EvalTransform) -> Iterator[NDArray[np.uint8]]:
    for index in picked:
        try:
            yield transform(read_image(files[index]), 0, 0)
        except UnreadableImageError as error:
            print(f"left out: {error}")


def read_class_names(given: str | None) -> tuple[str, ...]:
    """The names in a text file, one a line, or in a text with commas."""
    if given is None:
        return ()
    path = Path(given)
    names = path.read_text(encoding="utf-8").splitlines() if path.is_file() else given.split(",")
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise UserError(f"--class-names {given}: names are missing or come twice")
    return tuple(names)


def print_published() -> None:
    """The published weights, a paragraph each."""
    from detection.weights.hub import published

    for name, entry in published().items():
        print(f"{name}: {entry.kind}, {entry.figure or 'no published figure'}, {entry.input}, {entry.licence}")
        print(f"  {entry.url}")


def _save_theirs(converted: Converted, layout: Literal["torchvision", "timm"], out: Path) -> None:
    import torch

    from backbones.classifier import Classifier
    from backbones.state import write_whole
    from backbones.weights.foreign import to_timm, to_torchvision

    if not isinstance(converted.model, Classifier):
        raise UserError(f"only classifiers go to {layout}'s layout; this is a {type(converted.model).__name__}")
    state = to_torchvision(converted.model) if layout == "torchvision" else to_timm(converted.model)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(out, buffer.getbuffer())


if __name__ == "__main__":
    main()
