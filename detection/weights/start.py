"""How a training starts from weights that exist: the network they need, and filling it."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.state import load_state
from backbones.weights.native import adopt_config, load_backbone
from backbones.weights.readers import WeightsFile
from detection.engine.plain import differences
from detection.models.detector import Detector, DetectorConfig, Triple
from detection.weights.native import DetectorFile, read_file

Part = Literal["all", "backbone"]


Source = str | Path | DetectorFile | WeightsFile
"""Weights to start from: what ``read_file`` takes, or has read (a training needs them twice and reads them once)."""


def adopt_network(config: DetectorConfig, source: Source, part: Part = "all") -> tuple[DetectorConfig, str]:
    """The network that weights were made for, with the user's choices.

    Of a whole detector everything that its numbers depend on is as in its file: backbone, taps, extra maps, anchors,
    score, background column, padding, epsilons, normalisation. Input size, way of resizing, momenta and freezing stay as
    in the config. Of a backbone, or with ``part`` "backbone", the backbone and the normalisation are taken.

    Args:
        config: what was asked for; not changed.
        source: of the weights.
        part: what of a whole detector is wanted.

    Returns:
        The config to build, and a sentence on what was taken over ("" where nothing differs).

    Raises:
        FileNotFoundError, UserError: no such file, or one that does not tell.
    """
    file = _read(source)
    if isinstance(file, DetectorFile):
        if file.info.quantize != "off":
            raise UserError(f"{file.source} was fine-tuned in 8 bits; start from the checkpoint that it was made of")
        theirs = file.info.model
        own = {name: getattr(theirs.backbone, name) for name in MobileNetV2Config.fields_of_weights}
        backbone = replace(config.backbone, **own)
        mean, std = theirs.mean, theirs.std
        adopted = config.replaced()
        if part == "all":
            if type(theirs) is not type(config):
                raise UserError(
                    f"{file.source} holds a detector of kind {theirs.kind}, the config asks for {config.kind}; take a recipe of "
                    f"that kind (finetune:{theirs.kind}), or its backbone alone: --weights-part backbone"
                )
            adopted = config.replaced(**{name: getattr(theirs, name) for name in config.fields_of_weights})
    else:
        backbone, info = adopt_config(config.backbone, file)
        mean, std = info.mean, info.std
        adopted = config.replaced()
    adopted = adopted.replaced(backbone=backbone, mean=config.mean or mean, std=config.std or std)
    usual = config.replaced(mean=config.mean or IMAGENET_MEAN, std=config.std or IMAGENET_STD)  # what None becomes
    changes = differences(usual, adopted)
    return adopted, f"the network is built as {file.source} needs it: {', '.join(map(str, changes))}" if changes else ""


def start_from(model: Detector, source: Source, class_names: tuple[str, ...], part: Part = "all") -> str:
    """Fill a new detector with what is there: a whole detector, or a backbone under new heads.

    Where the file's detector knows other classes, the layers that predict classes stay new and everything else is loaded.

    Args:
        model: filled, or not touched where an error is raised.
        source: of the weights.
        class_names: the classes that the model is to learn.
        part: what of a whole detector is loaded.

    Returns:
        A sentence on what was loaded and what is new.

    Raises:
        FileNotFoundError, UserError, OSError: as ``read_file``; every tensor that does not fit is named.
    """
    file = _read(source)
    if isinstance(file, WeightsFile):
        loaded = load_backbone(model.backbone, file)
        _adopt_normalisation(model, loaded.mean, loaded.std)
        return f"backbone from {file.source}; extra maps and heads are new"
    state, info = file.state, file.info
    if part == "backbone":
        _check_same_network(model.config, info.model, file.source, only_backbone=True)
        prefix = "backbone."
        backbone = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        load_state(model.backbone, model.backbone.without_left_out(backbone), file.source)
        new = "; extra maps and heads are new"
    else:
        _check_same_network(model.config, info.model, file.source)
        new = ""
        if info.class_names != class_names:
            own = model.state_dict()
            state = state | {key: own[key] for key in model.class_tensors()}
            new = (
                f"; it knows {len(info.class_names)} classes ({_some(info.class_names)}) and is to learn "
                f"{len(class_names)} ({_some(class_names)}): the layers that predict classes are new"
            )
        load_state(model, state, file.source)
    if info.model.mean is not None and info.model.std is not None:
        _adopt_normalisation(model, info.model.mean, info.model.std)
    return f"{'backbone of the detector' if part == 'backbone' else 'detector'} from {file.source}{new}"


def _read(source: Source) -> DetectorFile | WeightsFile:
    return read_file(source) if isinstance(source, str | Path) else source


def _adopt_normalisation(model: Detector, mean: Triple, std: Triple) -> None:
    """The weights' own normalisation, unless the config asks for another."""
    config = model.config
    model.normalise_with(config.mean or mean, config.std or std)


def _check_same_network(
    config: DetectorConfig, of_file: DetectorConfig, source: str, only_backbone: bool = False
) -> None:
    """What no shape shows: the padding and the epsilon of the backbone, the tap, the anchors."""
    values = [(f"backbone.{name}", getattr(of_file.backbone, name), getattr(config.backbone, name))
              for name in MobileNetV2Config.fields_of_weights]  # fmt: skip
    if not only_backbone:
        values.append(("kind", of_file.kind, config.kind))
        names = config.fields_of_weights if of_file.kind == config.kind else ()
        values += [(name, getattr(of_file, name), getattr(config, name)) for name in names]
    differences = [
        f"  {name}: the weights have {theirs}, the config {ours}" for name, theirs, ours in values if theirs != ours
    ]
    if differences:
        raise UserError(
            "\n".join([f"{source} was made with another network; set --model.* to what it has:", *differences])
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
