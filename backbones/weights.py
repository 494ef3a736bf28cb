"""Strict loading and saving of backbone and classifier weights.

Two layouts are read: torchvision's state dict (.pt, .pth, or its own download) and ours (.safetensors, with metadata).
Each foreign layout is one function that gives the key table ours -> theirs, and one entry in ``_read``.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.classifier import Classifier
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PUBLIC_WIDTHS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1, 1.2, 1.3, 1.4)

# Fields of MobileNetV2Config that change what the numbers mean; the others (freezing, momentum) may differ.
_FIELDS_OF_WEIGHTS = ("width", "settings", "last_channels", "residual", "padding", "norm_eps")


@dataclass(kw_only=True, slots=True)
class WeightsInfo:
    """What has to travel with weights so that they can be used.

    Attributes:
        mean: per RGB channel, in units of pixel / 255, subtracted from a picture.
        std: per RGB channel, in units of pixel / 255; a picture is divided by it after the mean was subtracted.
        class_names: name of each output of the classifier, empty where nobody knows them.
        source: where the weights come from.
        licence: what may be done with them, as far as known.
        layout: "litedet" or "torchvision".
        padding: the padding mode that the weights were trained with.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    class_names: tuple[str, ...] = ()
    source: str = ""
    licence: str = ""
    layout: str = "litedet"
    padding: str = "symmetric"


def load_backbone(backbone: MobileNetV2, source: str | Path) -> WeightsInfo:
    """Fill a backbone with weights; the linear layer of a classifier in the file is left aside.

    Args:
        backbone: filled completely, or not touched where an error is raised.
        source: a file (.safetensors of ours, .pt or .pth in torchvision's layout), or "torchvision:IMAGENET1K_V1",
            "torchvision:IMAGENET1K_V2" or "torchvision" (its best) for torchvision's own download, checked by its hash.

    Returns:
        What travels with the weights: among it the mean and std to normalise pictures with.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a weights file, made for another config, or tensors that do not fit (all named).
        OSError: a download that failed, with the place where the file can be put by hand.
    """
    state, info = _read(source, backbone.config)
    state = {key.removeprefix("backbone."): tensor for key, tensor in state.items() if not key.startswith("linear.")}
    _check_fit(backbone, state, source)
    backbone.load_state_dict(state, strict=True)
    return info


def load_classifier(
    classifier: Classifier, source: str | Path, class_names: tuple[str, ...] = ()
) -> tuple[WeightsInfo, str]:
    """Fill a classifier with weights; where the file was made for other classes its linear layer stays as it was made.

    Args:
        classifier: filled, or not touched where an error is raised.
        source: as for ``load_backbone``.
        class_names: what the classes of ``classifier`` are called, empty where nobody knows.

    Returns:
        What travels with the weights, and a sentence on the linear layer where it was not loaded ("" where it was).

    Raises:
        FileNotFoundError, ValueError, OSError: as ``load_backbone``.
    """
    state, info = _read(source, classifier.backbone.config)
    own_layer = {f"linear.{key}": tensor for key, tensor in classifier.linear.state_dict().items()}
    remark = ""
    if "linear.weight" not in state:
        remark = f"{source} has no classifier: the linear layer for {classifier.num_classes} classes is new"
    elif len(state["linear.weight"]) != classifier.num_classes:
        num_classes = len(state["linear.weight"])
        remark = f"{source} has {num_classes} classes: the linear layer for {classifier.num_classes} classes is new"
    elif class_names and info.class_names and class_names != info.class_names:
        ours, theirs = next(pair for pair in zip(class_names, info.class_names, strict=True) if pair[0] != pair[1])
        remark = f"{source} has other classes ({theirs!r} where the data has {ours!r}): the linear layer is new"
    if remark:
        state = {key: tensor for key, tensor in state.items() if not key.startswith("linear.")} | own_layer
    _check_fit(classifier, state, source)
    classifier.load_state_dict(state, strict=True)
    return info, remark


def save_weights(path: Path, model: MobileNetV2 | Classifier, info: WeightsInfo) -> None:
    """Write a backbone or a whole classifier as .safetensors; a run that is killed leaves no half file.

    Raises:
        ValueError: the name does not end in .safetensors, or there are class names but not one for each class.
    """
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: weights are written as .safetensors; give the file that ending")
    if isinstance(model, Classifier) and info.class_names and len(info.class_names) != model.num_classes:
        raise ValueError(f"{len(info.class_names)} class names for a classifier of {model.num_classes} classes")
    backbone = model.backbone if isinstance(model, Classifier) else model
    metadata = {
        "layout": "litedet",
        "backbone": json.dumps(asdict(backbone.config)),
        "padding": backbone.config.padding,
        "mean": json.dumps(info.mean),
        "std": json.dumps(info.std),
        "class_names": json.dumps(info.class_names, ensure_ascii=False),
        "source": info.source,
        "licence": info.licence,
    }
    prefix = "" if isinstance(model, Classifier) else "backbone."
    # safetensors stores plain rows: channels-last weights are laid out anew.
    state = {prefix + key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    save_file(state, temporary, metadata)
    os.replace(temporary, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; no tensor is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a safetensors file.
    """
    path = _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def torchvision_keys(config: MobileNetV2Config) -> dict[str, str]:
    """Key table ours -> torchvision's for a classifier (torchvision/models/mobilenetv2.py, 0.29).

    Theirs counts: features.0 the stem, one number for every block, one for the last convolution, classifier.1 the
    linear layer; inside a block the expansion, where there is one, moves the numbers behind it by one.
    """
    layers = {"backbone.stem": ("features.0.0", "features.0.1")}
    index = 0
    for stage, (expansion, _, num_blocks, _) in enumerate(config.settings, start=1):
        for block in range(num_blocks):
            index += 1
            ours, theirs = f"backbone.stage{stage}.{block}", f"features.{index}.conv"
            place = 0
            if expansion > 1:
                layers[f"{ours}.expand"] = (f"{theirs}.0.0", f"{theirs}.0.1")
                place = 1
            layers[f"{ours}.depthwise"] = (f"{theirs}.{place}.0", f"{theirs}.{place}.1")
            layers[f"{ours}.project"] = (f"{theirs}.{place + 1}", f"{theirs}.{place + 2}")
    layers["backbone.last"] = (f"features.{index + 1}.0", f"features.{index + 1}.1")
    table = {}
    for layer, (conv, norm) in layers.items():
        table[f"{layer}.conv.weight"] = f"{conv}.weight"
        for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            table[f"{layer}.norm.{name}"] = f"{norm}.{name}"
    return table | {"linear.weight": "classifier.1.weight", "linear.bias": "classifier.1.bias"}


def to_torchvision(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict of a classifier in torchvision's layout.

    Raises:
        ValueError: the config has something that torchvision's network has not.
    """
    _check_config(classifier.backbone.config, _torchvision_config(classifier.backbone.config), "torchvision's network")
    table = torchvision_keys(classifier.backbone.config)
    return {table[key]: tensor for key, tensor in classifier.state_dict().items()}


def _read(source: str | Path, config: MobileNetV2Config) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A file's tensors under the keys of ``Classifier``, after its settings were held against the config."""
    if isinstance(source, str) and (source == "torchvision" or source.startswith("torchvision:")):
        theirs, info = _download_torchvision(source)
        return _from_torchvision(theirs, config, source), info
    path = _existing(source)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if metadata.get("layout") != "litedet":
            raise ValueError(
                f"{path} has no metadata of ours (layout is {metadata.get('layout')!r}); "
                "read here are .safetensors files written by save_weights, for example RUN/backbone.safetensors"
            )
        info, config_of_file = _parse_metadata(metadata, path)
        _check_config(config, config_of_file, str(path))
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, info  # noqa: SIM118 (safe_open is no dict)
    theirs = _read_state_dict(path)
    if "features.0.0.weight" in theirs:
        return _from_torchvision(theirs, config, path), WeightsInfo(layout="torchvision", source=path.name)
    raise ValueError(
        f"{path} is not in a layout that is known here: its first keys are {', '.join(list(theirs)[:4]) or 'none'}; "
        "read are torchvision's mobilenet_v2 (features.0.0.weight, ...) and our .safetensors"
    )


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights: {path} {what}; give a .safetensors, .pt or .pth file, or 'torchvision'")
    return path


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path} is not a weights file that torch.load(weights_only=True) reads: {reason}") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        inside = (
            f"a dict with the keys {', '.join(map(str, list(state)[:6]))}" if isinstance(state, Mapping) else "no dict"
        )
        raise ValueError(f"{path} holds {inside}, not a state dict (name -> tensor) of a backbone or classifier")
    return dict(state)


def _torchvision_config(config: MobileNetV2Config) -> MobileNetV2Config:
    """What torchvision's network is, where its state dict says it by itself; width and settings show in the shapes."""
    return replace(config, residual="identity", padding="symmetric", norm_eps=1e-5)


def _from_torchvision(theirs: Mapping[str, Tensor], config: MobileNetV2Config, source: str | Path) -> dict[str, Tensor]:
    _check_config(config, _torchvision_config(config), str(source))
    table = {their_key: our_key for our_key, their_key in torchvision_keys(config).items()}
    state = {table.get(key, key): tensor for key, tensor in theirs.items()}
    for key in table.values():
        if key.endswith("num_batches_tracked"):  # counts batches and enters no result; old files lack it
            state.setdefault(key, torch.zeros((), dtype=torch.int64))
    return state


def _download_torchvision(source: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    from torchvision.models import MobileNet_V2_Weights  # only here: backbones need torch alone

    name = source.partition(":")[2] or "IMAGENET1K_V2"
    if name not in MobileNet_V2_Weights.__members__:
        raise ValueError(
            f"torchvision has no weights {name!r}; there are: {', '.join(MobileNet_V2_Weights.__members__)}"
        )
    weights = MobileNet_V2_Weights[name]
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(weights.url).path).name
    try:
        state = torch.hub.load_state_dict_from_url(
            weights.url, map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except (OSError, RuntimeError) as error:  # no network, or a hash that differs
        raise OSError(
            f"{source}: {weights.url} could not be downloaded ({error}); fetch it by hand and put it at {file}"
        ) from error
    info = WeightsInfo(
        class_names=tuple(weights.meta["categories"]), source=weights.url, licence="BSD-3-Clause", layout="torchvision"
    )
    return state, info


def _parse_metadata(metadata: Mapping[str, str], path: Path) -> tuple[WeightsInfo, MobileNetV2Config]:
    try:
        fields = json.loads(metadata["backbone"])
        fields["settings"] = tuple(tuple(row) for row in fields["settings"])
        info = WeightsInfo(
            mean=_three(metadata["mean"]),
            std=_three(metadata["std"]),
            class_names=tuple(json.loads(metadata["class_names"])),
            source=metadata["source"],
            licence=metadata["licence"],
            padding=metadata["padding"],
        )
        return info, MobileNetV2Config(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: its metadata cannot be read ({type(error).__name__}: {error})") from error


def _three(text: str) -> tuple[float, float, float]:
    red, green, blue = json.loads(text)
    return float(red), float(green), float(blue)


def _check_config(config: MobileNetV2Config, of_file: MobileNetV2Config, source: str) -> None:
    differences: list[tuple[str, Any, Any]] = [
        (name, getattr(of_file, name), getattr(config, name))
        for name in _FIELDS_OF_WEIGHTS
        if getattr(of_file, name) != getattr(config, name)
    ]
    if differences:
        lines = [f"  {name}: the weights have {theirs!r}, the config {ours!r}" for name, theirs, ours in differences]
        advice = " ".join(f"{name}={theirs!r}" for name, theirs, _ in differences)
        raise ValueError("\n".join([f"{source} was made for another backbone; set {advice}", *lines]))


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Every tensor of the model is there with its shape, and nothing else is."""
    own = model.state_dict()
    problems = [f"  missing: {key}, expected {_shape(own[key])}" for key in own if key not in state]
    problems += [f"  unexpected: {key}, got {_shape(state[key])}" for key in state if key not in own]
    problems += [
        f"  shape: {key}, got {_shape(state[key])}, expected {_shape(own[key])}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if problems:
        backbone = model.backbone if isinstance(model, Classifier) else model
        assert isinstance(backbone, MobileNetV2)
        hint = _width_that_fits(
            {key.removeprefix("backbone."): tensor for key, tensor in state.items()}, backbone.config
        )
        head = f"{source} does not fit the network, nothing was loaded ({len(problems)} differences){hint}:"
        raise ValueError("\n".join([head, *problems]))


def _width_that_fits(state: Mapping[str, Tensor], config: MobileNetV2Config) -> str:
    for width in PUBLIC_WIDTHS:
        with torch.device("meta"):
            own = MobileNetV2(replace(config, width=width)).state_dict()
        if all(key in state and state[key].shape == tensor.shape for key, tensor in own.items()):
            return f"; these are the shapes of width={width}, the config has width={config.width}"
    return ""


def _shape(tensor: Tensor) -> Iterable[int]:
    return list(tensor.shape)
