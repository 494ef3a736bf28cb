"""Files of backbones and classifiers, read once: ours, torchvision's, timm's, and torchvision's own download."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backbones.errors import UserError
from backbones.mobilenetv2 import MobileNetV2Config
from backbones.state import existing_file, load_plain
from backbones.weights.foreign import check_config, from_foreign
from backbones.weights.info import LAYOUT, WeightsInfo, from_metadata
from backbones.weights.layouts import Layout, layout_of, nearest_config


@dataclass(kw_only=True, slots=True)
class WeightsFile:
    """The weights of a backbone or classifier, as they were read.

    Attributes:
        source: where from, for messages.
        layout: whose names ``state`` has: ours are those of ``Classifier``, with or without its linear layer.
        state: name -> tensor.
        info: what travels with the weights.
        config: the backbone they were made for; of another library's the public network that shares most shapes.
        exact: whether ``config`` is known to be that backbone: it stands in the file, or shares all shapes.
    """

    source: str
    layout: Layout | Literal["litedet"]
    state: Mapping[str, Tensor]
    info: WeightsInfo
    config: MobileNetV2Config
    exact: bool = True

    def tensors(self, config: MobileNetV2Config) -> dict[str, Tensor]:
        """The tensors under the names of ``Classifier``.

        Args:
            config: of the backbone that is to be filled.

        Raises:
            UserError: the weights were made for a backbone that differs where no shape tells it.
        """
        if self.layout != "litedet":
            return from_foreign(self.state, self.layout, config, self.source)
        check_config(config, self.config, self.source)
        return dict(self.state)


def read_weights(source: str | Path) -> WeightsFile:
    """The weights of a backbone or classifier.

    Args:
        source: a file (.safetensors of ours, or a state dict in torchvision's or timm's layout), or
            "torchvision:IMAGENET1K_V1", "torchvision:IMAGENET1K_V2" or "torchvision" (its best) for torchvision's own
            download, checked by its hash.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a weights file, or of a network that is not known here.
        OSError: a download that failed, with the place where the file can be put by hand.
    """
    if is_download(source):
        source = str(source)
        state, info = _download_torchvision(source)
        return WeightsFile(source=source, layout="torchvision", state=state, info=info, config=MobileNetV2Config())
    path = existing_file(source)
    if path.suffix != ".safetensors":
        return weights_of(load_plain(path), path)
    state, metadata = read_safetensors(path)
    if metadata.get("layout") == LAYOUT:
        info, config = from_metadata(metadata, path)
        return WeightsFile(source=str(path), layout="litedet", state=state, info=info, config=config)
    layout = layout_of(state)
    if layout is None:
        raise UserError(
            f"{path} has no metadata of ours (layout is {metadata.get('layout')!r}); "
            "read here are .safetensors files written by save_weights, for example RUN/backbone.safetensors, and timm's"
        )
    return _foreign(state, layout, path)


def is_download(source: object) -> bool:
    """Whether a source is the name of torchvision's own download and no file."""
    return isinstance(source, str) and (source == "torchvision" or source.startswith("torchvision:"))


def weights_of(content: object, path: Path) -> WeightsFile:
    """The weights in what ``torch.save`` wrote: a state dict in torchvision's or timm's layout.

    Args:
        content: of the file.
        path: of the file, for messages.

    Raises:
        UserError: something else.
    """
    state = state_dict_of(content, path)
    layout = layout_of(state)
    if layout is None:
        raise UserError(
            f"{path} is not in a layout that is known here: its first keys are {', '.join(list(state)[:4]) or 'none'}; "
            "read are torchvision's mobilenet_v2 (features.0.0.weight, ...), timm's mobilenetv2 (conv_stem.weight, ...) "
            "and our .safetensors; litedet convert-weights reads more"
        )
    return _foreign(state, layout, path)


def state_dict_of(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in what ``torch.save`` wrote, also where it is an entry of a training's checkpoint.

    Raises:
        UserError: there is none.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]  # a training's checkpoint, as timm and many others write it
    if (
        not isinstance(content, Mapping)
        or not all(isinstance(key, str) for key in content)
        or not all(isinstance(value, Tensor) for value in content.values())
    ):
        inside = (
            f"a dict with the keys {', '.join(map(str, list(content)[:6]))}"
            if isinstance(content, Mapping)
            else "no dict"
        )
        raise UserError(f"{path} holds {inside}, not a state dict (name -> tensor) of a backbone or classifier")
    return dict(content)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a .safetensors file.

    Raises:
        FileNotFoundError, OSError: see ``existing_file``.
        UserError: not a safetensors file.
    """
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, AttributeError) as error:  # an AttributeError: a type of numbers that this torch has not
        raise UserError(f"{path} is not a safetensors file that can be read: {error}") from error


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a .safetensors file; no tensor is read.

    Raises:
        FileNotFoundError, UserError, OSError: as ``read_safetensors``.
    """
    path = existing_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file that can be read: {error}") from error


def _foreign(state: dict[str, Tensor], layout: Layout, path: Path) -> WeightsFile:
    config, exact = nearest_config(state, layout)
    info = WeightsInfo(layout=layout, source=path.name)
    return WeightsFile(source=str(path), layout=layout, state=state, info=info, config=config, exact=exact)


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
