"""Strict loading and saving of backbone and classifier weights.

Three layouts are read: ours (.safetensors, with metadata), torchvision's state dict (.pt, .pth, or its own download) and
timm's (.pth, .safetensors); see ``readers``. Everything else is converted first.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.classifier import Classifier, ClassifierConfig
from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2, MobileNetV2Config
from backbones.state import check_state, load_state, misfits, write_whole
from backbones.weights.info import WeightsInfo
from backbones.weights.layouts import PUBLIC_WIDTHS
from backbones.weights.readers import WeightsFile, is_download, read_weights


def load_backbone(backbone: MobileNetV2, source: str | Path | WeightsFile) -> WeightsInfo:
    """Fill a backbone with weights; the linear layer of a classifier in the file is left aside, and so are the parts that
    the backbone was built without (``MobileNetV2.left_out``).

    Args:
        backbone: filled completely, or not touched where an error is raised.
        source: what ``read_weights`` takes, or has read.

    Returns:
        What travels with the weights: among it the mean and std to normalise images with.

    Raises:
        FileNotFoundError, UserError, OSError: as ``read_weights``; or made for another config, or tensors that do not fit
            (all named).
    """
    file = _read(source)
    state = {
        key.removeprefix("backbone."): tensor
        for key, tensor in file.tensors(backbone.config).items()
        if not key.startswith("linear.")
    }
    state = backbone.without_left_out(state)
    load_state(backbone, state, file.source, _hint(backbone, state, backbone.config))
    return file.info


def load_classifier(
    classifier: Classifier, source: str | Path | WeightsFile, class_names: tuple[str, ...] = ()
) -> tuple[WeightsInfo, str]:
    """Fill a classifier with weights; where the file was made for other classes its linear layer stays as it was made.

    Args:
        classifier: filled, or not touched where an error is raised.
        source: what ``read_weights`` takes, or has read.
        class_names: what the classes of ``classifier`` are called, empty where nobody knows.

    Returns:
        What travels with the weights, and a sentence on the linear layer where it was not loaded ("" where it was).

    Raises:
        FileNotFoundError, UserError, OSError: as ``load_backbone``.
    """
    file = _read(source)
    state = file.tensors(classifier.backbone.config)
    num_classes = _num_classes(state)
    remark = ""
    if not num_classes:
        remark = f"{file.source} has no classifier: the linear layer for {classifier.num_classes} classes is new"
    elif num_classes != classifier.num_classes:
        remark = (
            f"{file.source} has {num_classes} classes: the linear layer for {classifier.num_classes} classes is new"
        )
    elif class_names and file.info.class_names and class_names != file.info.class_names:
        pairs = zip(class_names, file.info.class_names, strict=False)
        ours, theirs = next(
            (pair for pair in pairs if pair[0] != pair[1]), (class_names[-1], file.info.class_names[-1])
        )
        remark = f"{file.source} has other classes ({theirs!r} where the data has {ours!r}): the linear layer is new"
    if remark:
        own_layer = {f"linear.{key}": tensor for key, tensor in classifier.linear.state_dict().items()}
        state = {key: tensor for key, tensor in state.items() if not key.startswith("linear.")} | own_layer
    load_state(classifier, state, file.source, _hint(classifier, state, classifier.backbone.config))
    return file.info, remark


def adopt_config(config: MobileNetV2Config, source: str | Path | WeightsFile) -> tuple[MobileNetV2Config, WeightsInfo]:
    """The config with all that belongs to the weights (width, padding, epsilon, ...) as a file has it.

    What the user chooses, freezing and momentum, stays. A network that is not known by its shapes leaves the config.

    Returns:
        The config, and what travels with the weights.

    Raises:
        FileNotFoundError, UserError, OSError: as ``read_weights``.
    """
    if is_download(source):  # known without it
        of_file, info = MobileNetV2Config(), WeightsInfo(layout="torchvision")
    else:
        file = _read(source)
        of_file, info = file.config, file.info
        if not file.exact:
            return config, info
    return replace(config, **{name: getattr(of_file, name) for name in MobileNetV2Config.fields_of_weights}), info


def read_model(source: str | Path | WeightsFile) -> tuple[Classifier | MobileNetV2, WeightsInfo]:
    """The network of a file as the file has it: a classifier, or a backbone where there is no linear layer.

    Raises:
        FileNotFoundError, UserError, OSError: as ``load_backbone``.
    """
    file = _read(source)
    config = file.config
    state = file.tensors(config)
    num_classes = _num_classes(state)
    if not num_classes:
        backbone = MobileNetV2(config)
        return backbone, load_backbone(backbone, file)
    with torch.device("meta"):  # a file says how large its network is: it has to hold it, too, before that is built
        check_state(Classifier(ClassifierConfig(backbone=config), num_classes), state, file.source)
    classifier = Classifier(ClassifierConfig(backbone=config), num_classes)
    load_state(classifier, state, file.source)
    return classifier.eval(), file.info


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
            "it again with litedet convert-weights --statistics-from FOLDER, or freeze them: --model.backbone.freeze-norm True"
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
    metadata = info.to_metadata(backbone.config)
    prefix = "" if isinstance(model, Classifier) else "backbone."
    write_safetensors(path, model, metadata, prefix)


def write_safetensors(path: Path, model: nn.Module, metadata: dict[str, str], prefix: str = "") -> None:
    """Write a network's state whole or not at all, readable to whom the umask lets; ``prefix`` goes before every key."""
    # safetensors stores plain rows: channels-last weights are laid out anew.
    state = {prefix + key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    write_whole(path, save(state, metadata))


def _read(source: str | Path | WeightsFile) -> WeightsFile:
    return source if isinstance(source, WeightsFile) else read_weights(source)


def _num_classes(state: Mapping[str, Tensor]) -> int:
    """Rows of the linear layer, 0 where there is none."""
    weight = state.get("linear.weight")
    return len(weight) if weight is not None and weight.dim() else 0


def _hint(model: nn.Module, state: Mapping[str, Tensor], config: MobileNetV2Config) -> str:
    """The public width that a state dict has the shapes of, where it does not fit the model."""
    if not misfits(model.state_dict(), state):
        return ""
    given = {key.removeprefix("backbone."): tensor for key, tensor in state.items()}
    for width in PUBLIC_WIDTHS:
        with torch.device("meta"):
            whole = MobileNetV2(replace(config, width=width)).state_dict()
        own = model.without_left_out(whole) if isinstance(model, MobileNetV2) else whole
        if all(key in given and given[key].shape == tensor.shape for key, tensor in own.items()):
            return f"; these are the shapes of width={width}, the config has width={config.width}"
    return ""
