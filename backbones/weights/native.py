"""Strict loading and saving of backbone and classifier weights.

Three layouts are read: ours (.safetensors, with metadata), torchvision's state dict (.pt, .pth, or its own download) and
timm's (.pth, .safetensors); ``layouts.py`` has their key tables. Everything else is converted first.
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
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.layers import IMAGENET_MEAN, IMAGENET_STD
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.weights.layouts import (
    PUBLIC_WIDTHS,
    Layout,
    keys_of,
    layout_of,
    nearest_config,
    timm_keys,
    torchvision_keys,
)


@dataclass(kw_only=True, slots=True)
class WeightsInfo:
    """What has to travel with weights so that they can be used.

    Attributes:
        mean: per RGB channel, in units of pixel / 255, subtracted from an image.
        std: per RGB channel, in units of pixel / 255; an image is divided by it after the mean was subtracted.
        class_names: name of each output of the classifier, empty where nobody knows them.
        source: where the weights come from.
        licence: what may be done with them, as far as known.
        layout: whose layout the weights came in: "litedet", "torchvision", "timm", "tflite".
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
        source: a file (.safetensors of ours, or a state dict in torchvision's or timm's layout), or
            "torchvision:IMAGENET1K_V1", "torchvision:IMAGENET1K_V2" or "torchvision" (its best) for torchvision's own
            download, checked by its hash.

    Returns:
        What travels with the weights: among it the mean and std to normalise images with.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a weights file, made for another config, or tensors that do not fit (all named).
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
        FileNotFoundError, UserError, OSError: as ``load_backbone``.
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


def adopt_config(config: MobileNetV2Config, source: str | Path) -> tuple[MobileNetV2Config, WeightsInfo]:
    """The config with all that belongs to the weights (width, padding, epsilon, ...) as a file has it.

    What the user chooses, freezing and momentum, stays. A network that is not known by its shapes leaves the config.

    Returns:
        The config, and what travels with the weights.

    Raises:
        FileNotFoundError, UserError: no such file, or one that does not tell.
    """
    info = WeightsInfo(layout="torchvision")
    of_file = MobileNetV2Config()  # torchvision's download
    if not _is_download(source):
        path = _existing(source)
        if path.suffix == ".safetensors" and "backbone" in (metadata := read_metadata(path)):
            info, of_file = _parse_metadata(metadata, path)
        else:
            theirs, layout = _read_foreign(path)
            info = WeightsInfo(layout=layout, source=path.name)
            of_file, exact = nearest_config(theirs, layout)
            if not exact:
                return config, info
    return replace(config, **{name: getattr(of_file, name) for name in MobileNetV2Config.fields_of_weights}), info


def read_model(source: str | Path) -> tuple[Classifier | MobileNetV2, WeightsInfo]:
    """The network of a file as the file has it: a classifier, or a backbone where there is no linear layer.

    Raises:
        FileNotFoundError, UserError, OSError: as ``load_backbone``.
    """
    if _is_download(source):
        config = MobileNetV2Config()
    else:
        path = _existing(source)
        if path.suffix == ".safetensors" and "backbone" in (metadata := read_metadata(path)):
            config = _parse_metadata(metadata, path)[1]
        else:
            config = nearest_config(*_read_foreign(path))[0]
    state, info = _read(source, config)
    if "linear.weight" not in state:
        backbone = MobileNetV2(config)
        return backbone, load_backbone(backbone, source)
    classifier = Classifier(ClassifierConfig(backbone=config), len(state["linear.weight"]))
    _check_fit(classifier, state, source)
    classifier.load_state_dict(state, strict=True)
    return classifier.eval(), info


def check_statistics(backbone: MobileNetV2, source: str | Path) -> None:
    """Refuse to train batch norms that were folded into the convolutions and know no statistics.

    Raises:
        UserError: every norm has mean 0 and variance 1 but a shift that somebody learnt, and is to be trained.
    """
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    folded = all(
        norm.running_mean is not None
        and norm.running_var is not None
        and not norm.running_mean.any()
        and bool((norm.running_var == 1).all())
        for norm in norms
    )
    if folded and any(bool(norm.bias.any()) for norm in norms) and not backbone.config.freeze_norm:
        raise UserError(
            f"{source} has its batch norms folded into the convolutions: the first training step would destroy it; convert "
            "it again with tools/convert_weights.py --statistics-from FOLDER, or freeze them: --model.backbone.freeze-norm True"
        )


def save_weights(path: Path, model: MobileNetV2 | Classifier, info: WeightsInfo) -> None:
    """Write a backbone or a whole classifier as .safetensors; a run that is killed leaves no half file.

    Raises:
        UserError: the name does not end in .safetensors, or there are class names but not one for each class.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: weights are written as .safetensors; give the file that ending")
    if isinstance(model, Classifier) and info.class_names and len(info.class_names) != model.num_classes:
        raise UserError(f"{len(info.class_names)} class names for a classifier of {model.num_classes} classes")
    backbone = model.backbone if isinstance(model, Classifier) else model
    metadata = {
        "layout": "litedet",
        "original_layout": info.layout,
        "backbone": json.dumps(asdict(backbone.config)),
        "padding": backbone.config.padding,
        "mean": json.dumps(info.mean),
        "std": json.dumps(info.std),
        "class_names": json.dumps(info.class_names, ensure_ascii=False),
        "source": info.source,
        "licence": info.licence,
    }
    prefix = "" if isinstance(model, Classifier) else "backbone."
    write_safetensors(path, model, metadata, prefix)


def write_safetensors(path: Path, model: nn.Module, metadata: dict[str, str], prefix: str = "") -> None:
    """Write a network's state whole or not at all, readable to whom the umask lets; ``prefix`` goes before every key."""
    # safetensors stores plain rows: channels-last weights are laid out anew.
    state = {prefix + key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_bytes(save(state, metadata))  # its save_file would let the owner alone read the file
    os.replace(temporary, path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; no tensor is read.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a safetensors file.
    """
    path = _existing(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file: {error}") from error


def to_torchvision(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict of a classifier in torchvision's layout.

    Raises:
        UserError: the config has something that torchvision's network has not.
    """
    config = classifier.backbone.config
    _check_config(config, replace(_foreign_config(config), fixed_ends=False), "torchvision's network")
    table = torchvision_keys(config)
    return {table[key]: tensor for key, tensor in classifier.state_dict().items()}


def to_timm(classifier: Classifier) -> dict[str, Tensor]:
    """The state dict of a classifier in timm's layout.

    Raises:
        UserError: the config has something that timm's network has not.
    """
    config = classifier.backbone.config
    _check_config(config, _foreign_config(config), "timm's network")
    table = timm_keys(config)
    return {table[key]: tensor for key, tensor in classifier.state_dict().items()}


def _read(source: str | Path, config: MobileNetV2Config) -> tuple[dict[str, Tensor], WeightsInfo]:
    """A file's tensors under the keys of ``Classifier``, after its settings were held against the config."""
    if _is_download(source):
        theirs, info = _download_torchvision(str(source))
        return _from_foreign(theirs, "torchvision", config, str(source)), info
    path = _existing(source)
    if path.suffix == ".safetensors":
        metadata = read_metadata(path)
        if metadata.get("layout") == "litedet":
            info, config_of_file = _parse_metadata(metadata, path)
            _check_config(config, config_of_file, str(path))
            return load_file(path), info
    theirs, layout = _read_foreign(path)
    return _from_foreign(theirs, layout, config, path), WeightsInfo(layout=layout, source=path.name)


def _is_download(source: str | Path) -> bool:
    return isinstance(source, str) and (source == "torchvision" or source.startswith("torchvision:"))


def _read_foreign(path: Path) -> tuple[dict[str, Tensor], Layout]:
    """A state dict of another library, under its own names, and whose it is."""
    if path.suffix == ".safetensors":
        state = load_file(path)
        layout = layout_of(state)
        if layout is None:
            raise UserError(
                f"{path} has no metadata of ours (layout is {read_metadata(path).get('layout')!r}); "
                "read here are .safetensors files written by save_weights, for example RUN/backbone.safetensors, and timm's"
            )
        return state, layout
    state = read_state_dict(path)
    layout = layout_of(state)
    if layout is None:
        raise UserError(
            f"{path} is not in a layout that is known here: its first keys are {', '.join(list(state)[:4]) or 'none'}; "
            "read are torchvision's mobilenet_v2 (features.0.0.weight, ...), timm's mobilenetv2 (conv_stem.weight, ...) "
            "and our .safetensors; tools/convert_weights.py reads more"
        )
    return state, layout


def _existing(source: str | Path) -> Path:
    path = Path(source)
    if not path.is_file():
        what = "is a folder, not a weights file" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"weights: {path} {what}; give a .safetensors, .pt or .pth file, or 'torchvision'")
    return path


def read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling garbage raises nearly anything
        reason = str(error).split("\n")[0][:200] or type(error).__name__
        raise UserError(f"{path} is not a weights file that torch.load(weights_only=True) reads: {reason}") from error
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]  # a training's checkpoint, as timm and many others write it
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        inside = (
            f"a dict with the keys {', '.join(map(str, list(state)[:6]))}" if isinstance(state, Mapping) else "no dict"
        )
        raise UserError(f"{path} holds {inside}, not a state dict (name -> tensor) of a backbone or classifier")
    return dict(state)


def _foreign_config(config: MobileNetV2Config) -> MobileNetV2Config:
    """What torchvision's and timm's networks are where no shape tells it; width and settings show in the shapes."""
    return replace(config, residual="identity", padding="symmetric", norm_eps=1e-5)


def _from_foreign(
    theirs: Mapping[str, Tensor], layout: Layout, config: MobileNetV2Config, source: str | Path
) -> dict[str, Tensor]:
    _check_config(config, _foreign_config(config), str(source))
    table = {their_key: our_key for our_key, their_key in keys_of(layout, config).items()}
    state = {table.get(key, key): tensor for key, tensor in theirs.items()}
    for key in table.values():
        if key.endswith("num_batches_tracked"):  # counts batches and enters no result; old files lack it
            state.setdefault(key, torch.zeros((), dtype=torch.int64))
    return state


def _download_torchvision(source: str) -> tuple[dict[str, Tensor], WeightsInfo]:
    from torchvision.models import MobileNet_V2_Weights  # only here: backbones need torch alone

    name = source.partition(":")[2] or "IMAGENET1K_V2"
    if name not in MobileNet_V2_Weights.__members__:
        raise UserError(
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
            layout=metadata.get("original_layout", "litedet"),
            padding=metadata["padding"],
        )
        return info, MobileNetV2Config(**fields)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({type(error).__name__}: {error})") from error


def _three(text: str) -> tuple[float, float, float]:
    red, green, blue = json.loads(text)
    return float(red), float(green), float(blue)


def _check_config(config: MobileNetV2Config, of_file: MobileNetV2Config, source: str) -> None:
    differences: list[tuple[str, Any, Any]] = [
        (name, getattr(of_file, name), getattr(config, name))
        for name in MobileNetV2Config.fields_of_weights
        if getattr(of_file, name) != getattr(config, name)
    ]
    if differences:
        lines = [f"  {name}: the weights have {theirs!r}, the config {ours!r}" for name, theirs, ours in differences]
        advice = " ".join(f"{name}={theirs!r}" for name, theirs, _ in differences)
        raise UserError("\n".join([f"{source} was made for another backbone; set {advice}", *lines]))


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
        raise UserError("\n".join([head, *problems]))


def _width_that_fits(state: Mapping[str, Tensor], config: MobileNetV2Config) -> str:
    for width in PUBLIC_WIDTHS:
        with torch.device("meta"):
            own = MobileNetV2(replace(config, width=width)).state_dict()
        if all(key in state and state[key].shape == tensor.shape for key, tensor in own.items()):
            return f"; these are the shapes of width={width}, the config has width={config.width}"
    return ""


def _shape(tensor: Tensor) -> Iterable[int]:
    return list(tensor.shape)
