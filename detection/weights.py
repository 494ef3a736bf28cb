"""A detector on disk: what travels with the weights, and how a training starts from other weights.

Two kinds of file hold a whole detector: a checkpoint of a training (``best.pt``) and a ``.safetensors`` file, which holds
the same without the state of the training.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.mobilenetv2 import MobileNetV2Config
from backbones.weights import (
    FIELDS_OF_WEIGHTS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    adopt_config,
    load_backbone,
    write_safetensors,
)
from detection.engine.checkpoint import load_checkpoint, load_weights
from detection.model import Detector, DetectorConfig
from detection.plain import differences, from_plain, to_plain
from detection.postprocess import PostprocessConfig
from detection.published import locate

Part = Literal["all", "backbone"]

LAYOUT = "litedet detector"


@dataclass(kw_only=True, slots=True)
class DetectorInfo:
    """What has to travel with a detector's weights so that they can be used.

    Attributes:
        model: how the network is built.
        postprocess: how its predictions become detections in an evaluation.
        class_names: name of each label.
        category_ids: id of each label in the annotation files it learnt from.
        source: where the weights come from.
        licence: what may be done with them, as far as known.
    """

    model: DetectorConfig
    postprocess: PostprocessConfig
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    source: str = ""
    licence: str = ""


def read_detector(path: str | Path, input_size: tuple[int, int] | None = None) -> tuple[Detector, DetectorInfo]:
    """The detector of a file, on the CPU and in evaluation mode.

    Args:
        path: a training's ``best.pt`` or ``last.pt``, a detector's ``.safetensors``, or a published name.
        input_size: (height, width) in place of the one it was trained at; the anchors follow.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file holds no detector, or one that does not fit its own config.
        OSError: published weights that cannot be downloaded, with the place where to put them by hand.
    """
    path = locate(path)
    state, info = _read(path)
    if input_size is not None:
        info.model.input_size = input_size
    model = Detector(info.model, len(info.class_names))
    load_weights(model, state, str(path))
    return model.eval(), info


def save_detector(path: Path, model: Detector, info: DetectorInfo) -> None:
    """Write a detector as ``.safetensors``; a run that is killed leaves no half file.

    Raises:
        ValueError: the name does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a detector is written as .safetensors; give the file that ending")
    metadata = {"layout": LAYOUT, "detector": json.dumps(to_plain(info), ensure_ascii=False)}
    write_safetensors(path, model, metadata)


def adopt_network(config: DetectorConfig, source: str | Path, part: Part = "all") -> tuple[DetectorConfig, str]:
    """The network that weights were made for, with the user's choices.

    Of a whole detector everything that its numbers depend on is as in its file: backbone, taps, extra maps, anchors,
    score, background column, padding, epsilons, normalisation. Input size, way of resizing, momenta and freezing stay as
    in the config. Of a backbone, or with ``part`` "backbone", the backbone and the normalisation are taken.

    Args:
        config: what was asked for; not changed.
        source: a detector (``read_detector``) or a backbone (``backbones.weights.load_backbone``).
        part: what of a whole detector is wanted.

    Returns:
        The config to build, and a sentence on what was taken over ("" where nothing differs).

    Raises:
        FileNotFoundError, ValueError: no such file, or one that does not tell.
    """
    if holds_detector(source):
        theirs = _read(source)[1].model
        backbone: MobileNetV2Config = replace(
            config.backbone, **{name: getattr(theirs.backbone, name) for name in FIELDS_OF_WEIGHTS}
        )
        mean, std = theirs.mean, theirs.std
        if part == "all":
            adopted = replace(
                theirs,
                **{
                    name: getattr(config, name)
                    for name in ("input_size", "resize", "norm_momentum", "init_std", "prior")
                },
            )
        else:
            adopted = replace(config)
    else:
        backbone, info = adopt_config(config.backbone, source)
        mean, std = info.mean, info.std
        adopted = replace(config)
    adopted.backbone = backbone
    adopted.mean, adopted.std = config.mean or mean, config.std or std
    usual = replace(config, mean=config.mean or IMAGENET_MEAN, std=config.std or IMAGENET_STD)  # what None becomes
    changes = differences(usual, adopted)
    return adopted, f"the network is built as {source} needs it: {', '.join(changes)}" if changes else ""


def start_from(model: Detector, source: str | Path, class_names: tuple[str, ...], part: Part = "all") -> str:
    """Fill a new detector with what is there: a whole detector, or a backbone under new heads.

    Where the file's detector knows other classes, the layers that predict classes stay new and everything else is loaded.

    Args:
        model: filled, or not touched where an error is raised.
        source: a detector (``read_detector``) or a backbone (``backbones.weights.load_backbone``).
        class_names: the classes that the model is to learn.
        part: what of a whole detector is loaded.

    Returns:
        A sentence on what was loaded and what is new.

    Raises:
        FileNotFoundError, ValueError, OSError: as the two functions above; every tensor that does not fit is named.
    """
    if not holds_detector(source):
        loaded = load_backbone(model.backbone, source)
        _adopt_normalisation(model, loaded.mean, loaded.std)
        return f"backbone from {source}; extra maps and heads are new"
    state, info = _read(source)
    if part == "backbone":
        _check_same_network(model.config, info.model, str(source), only_backbone=True)
        prefix = "backbone."
        backbone = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
        load_weights(model.backbone, backbone, str(source))
        new = "; extra maps and heads are new"
    else:
        _check_same_network(model.config, info.model, str(source))
        new = ""
        if info.class_names != class_names:
            own = model.state_dict()
            # Of a class branch the last 1x1 convolution alone depends on the classes.
            outputs = [key for key in own if key.startswith("head.classes.") and key.split(".")[3] == "1"]
            state |= {key: own[key] for key in outputs}
            new = (
                f"; it knows {len(info.class_names)} classes ({_some(info.class_names)}) and is to learn "
                f"{len(class_names)} ({_some(class_names)}): the layers that predict classes are new"
            )
        load_weights(model, state, str(source))
    if info.model.mean is not None and info.model.std is not None:
        _adopt_normalisation(model, info.model.mean, info.model.std)
    return f"{'backbone of the detector' if part == 'backbone' else 'detector'} from {source}{new}"


def holds_detector(source: str | Path) -> bool:
    """Whether a file holds a whole detector, as against a backbone or classifier, or the name of a download."""
    path = Path(source)
    if path.suffix == ".safetensors" and path.is_file():
        return _metadata(path).get("layout") == LAYOUT
    if not path.is_file():
        return False
    try:
        load_checkpoint(path)
    except ValueError:
        return False
    return True


def _read(path: str | Path) -> tuple[dict[str, Tensor], DetectorInfo]:
    path = Path(path)
    if path.suffix == ".safetensors" and path.is_file():
        metadata = _metadata(path)
        if metadata.get("layout") != LAYOUT:
            raise ValueError(
                f"{path} holds no detector (its layout is {metadata.get('layout')!r}); it may be a backbone"
            )
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no dict)
        return state, from_plain(json.loads(metadata["detector"]), DetectorInfo)
    content = load_checkpoint(path)
    extra: Mapping[str, Any] = content["extra"]
    if "detector" not in extra:
        raise ValueError(f"{path} is a checkpoint, but not of a detector; train one with tools/train_det.py")
    return dict(content["weights"]), from_plain(extra["detector"], DetectorInfo)


def _metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def _adopt_normalisation(model: Detector, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
    """The weights' own normalisation, unless the config asks for another."""
    config = model.config
    model.normalise_with(config.mean or mean, config.std or std)


def _check_same_network(
    config: DetectorConfig, of_file: DetectorConfig, source: str, only_backbone: bool = False
) -> None:
    """What no shape shows: the padding and the epsilon of the backbone, the tap, the anchors."""
    values = [(f"backbone.{name}", getattr(of_file.backbone, name), getattr(config.backbone, name))
              for name in FIELDS_OF_WEIGHTS]  # fmt: skip
    if not only_backbone:
        names = ("features", "extra_channels", "anchors", "score", "background_column", "norm_eps")
        values += [(name, getattr(of_file, name), getattr(config, name)) for name in names]
    differences = [
        f"  {name}: the weights have {theirs}, the config {ours}" for name, theirs, ours in values if theirs != ours
    ]
    if differences:
        raise ValueError(
            "\n".join([f"{source} was made with another network; set --model.* to what it has:", *differences])
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
