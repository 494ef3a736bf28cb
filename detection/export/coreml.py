"""Core ML (``.mlpackage``): an RGB image in, raw heads out, in 32 bits or 16. Converted and checked here, run on Apple's systems.

No other system runs Core ML, so a file is not compared with torch: it is read back, and its input, outputs and weights are looked
at.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from backbones.errors import UserError
from detection.engine.quiet import quiet
from detection.export.module import Network
from detection.export.options import ExportOptions, Record, Variant
from detection.export.sensitivity import layers_of
from detection.inference.exported import KEY

PACKAGES = ("coremltools",)
_LOGS = ("", "coremltools", "torch.utils._pytree")
NOT_RUN = "not run: needs macOS"


class CoreMLFile:
    """A model of Core ML in memory; on disk it is a folder.

    Args:
        model: a ``coremltools.models.MLModel``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def write(self, path: Path, record: Record) -> None:
        """See ``Artefact``. A folder of that name is replaced once the new one is whole."""
        self.model.user_defined_metadata[KEY] = record.to_json()
        self.model.short_description = f"LiteDet, {len(record.class_names)} classes"
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".coreml-") as folder:
            staged = Path(folder, path.name)
            with quiet(*_LOGS):
                self.model.save(str(staged))
            put_folder(staged, path)


def put_folder(staged: Path, path: Path) -> None:
    """Renames a folder into its place; one that is there goes, after the new one has come.

    Args:
        staged: whole, on the same file system.
        path: its name.
    """
    old = path.with_name(f"{path.name}.{secrets.token_hex(4)}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(staged, path)
    shutil.rmtree(old, ignore_errors=True)


def variants(network: Network, options: ExportOptions) -> Iterator[Variant]:
    """Ways to make the file; see ``Exporter``.

    Raises:
        ImportError: the package is missing.
        UserError: int8.
    """
    with quiet(*_LOGS):
        import coremltools  # noqa: F401  asked for before any work is done

    if options.int8:
        raise UserError("--to coreml writes float32, or float16 (--fp16); its int8 cannot be measured here")
    yield Variant(name="", make=lambda: _converted(network, options.fp16))


def _converted(network: Network, fp16: bool) -> CoreMLFile:
    import coremltools as ct

    with quiet(*_LOGS):
        traced = torch.jit.trace(network.module, (network.image.float(),))
        image = ct.ImageType(name="image", shape=tuple(network.image.shape), color_layout=ct.colorlayout.RGB)
        model = ct.convert(
            traced,
            inputs=[image],
            outputs=[ct.TensorType(name=name) for name in network.outputs],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT16 if fp16 else ct.precision.FLOAT32,
            convert_to="mlprogram",
            skip_model_load=True,
        )
    return CoreMLFile(model)


def check(path: Path, network: Network) -> str:
    """Reads a file back and compares its structure with the network's.

    Args:
        path: of the ``.mlpackage``.
        network: what it was made of.

    Returns:
        What was found, for people.

    Raises:
        UserError: the input is no RGB image of the input size, an output is missing or of another shape, or it has other
            layers than the network.
    """
    import coremltools as ct

    with quiet(*_LOGS):
        spec = ct.models.MLModel(str(path), skip_model_load=True).get_spec()
    (given,) = spec.description.input
    image = given.type.imageType
    size = (image.height, image.width)
    if size != tuple(network.input_size) or image.colorSpace != image.RGB:
        raise UserError(
            f"{path}: its input is {size}, colour space {image.colorSpace}, wanted is RGB {network.input_size}"
        )
    with torch.no_grad():
        wanted = {
            name: tuple(one.shape) for name, one in zip(network.outputs, network.module(network.image), strict=True)
        }
    found = {one.name: tuple(one.type.multiArrayType.shape) for one in spec.description.output}
    if set(found) != set(wanted):
        raise UserError(f"{path}: its outputs are {found}, wanted are {wanted}")
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    shapes = {one.name: _shape(one) for operation in block.operations for one in operation.outputs}
    if any(shapes.get(name) != shape for name, shape in wanted.items()):
        raise UserError(f"{path}: its outputs have the shapes {[shapes.get(name) for name in wanted]}, not {wanted}")
    convolutions = sum(operation.type == "conv" for operation in block.operations)
    expected = sum(isinstance(layer, torch.nn.Conv2d) for layer in layers_of(network).values())
    if convolutions != expected:
        raise UserError(f"{path}: it has {convolutions} convolutions, the network has {expected}")
    return f"structure checked: RGB {size[0]}x{size[1]} in, {wanted} out, {convolutions} convolutions"


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(one.constant.size) for one in value.type.tensorType.dimensions)
