"""What may be given to a predictor as an image, and how it becomes RGB uint8 [H, W, 3]."""

from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as PILImage
from PIL import ImageOps
from torch import Tensor

from backbones.errors import UserError
from detection.images.decode import read_image

Image: TypeAlias = NDArray[np.uint8] | Tensor | PILImage.Image | str | Path
"""An image in one of these forms:

* the path of an image file;
* a numpy array, RGB uint8 [H, W, 3];
* a PIL image of any mode up to 8 bits a channel, turned as its EXIF data says, so that it gives what its file gives;
* a torch tensor, RGB [3, H, W], on any device: uint8, or floating point in 0..1 as torchvision's transforms make it.
"""

_FORMS = (
    "an image is a path, an RGB uint8 array of shape (height, width, 3), a PIL image or an RGB tensor of shape "
    "(3, height, width)"
)


def to_array(image: Any) -> NDArray[np.uint8]:
    """One image as RGB uint8 [H, W, 3].

    Args:
        image: see ``Image``.

    Raises:
        FileNotFoundError, UserError: an image that is not there, does not decode, or is none of these forms.
    """
    if isinstance(image, str | Path):
        return read_image(image)
    if isinstance(image, PILImage.Image):
        return _from_pil(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    if not isinstance(image, np.ndarray):
        raise UserError(f"{_FORMS}; got {_name(image)}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        hint = ""
        if image.dtype == np.uint8 and (image.ndim == 2 or image.shape[2:] == (1,)):
            hint = "; a grey one becomes RGB with cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)"
        elif image.dtype.kind == "f":
            hint = "; one in 0..1 becomes uint8 with (image * 255).round().astype('uint8')"
        raise UserError(
            f"an image array is RGB uint8 of shape (height, width, 3), got {image.dtype} {image.shape}{hint}"
        )
    return image


def _from_pil(image: PILImage.Image) -> NDArray[np.uint8]:
    if image.mode[0] in "IF":  # I, I;16, F: convert() would cut them off at 255
        raise UserError(f"a PIL image of mode {image.mode} has more than 8 bits a channel; scale it to 0..255 first")
    array = np.asarray(ImageOps.exif_transpose(image).convert("RGB"), np.uint8)
    if not array.size:
        raise UserError(f"a PIL image of {image.width} x {image.height} pixels has nothing to look at")
    return array


def _from_tensor(image: Tensor) -> NDArray[np.uint8]:
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
        hint = ""
        if image.ndim == 4:
            hint = "; a batch is given as list(images)"
        elif image.shape[-1:] == (3,):
            hint = "; permute(2, 0, 1) brings the channels to the front"
        raise UserError(f"an image tensor is RGB of shape (3, height, width), got {tuple(image.shape)}{hint}")
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        if not image.is_floating_point():
            raise UserError(f"an image tensor is uint8, or floating point in 0..1; got {image.dtype}")
        image = image.float()
        low, high = (value.item() for value in image.aminmax())
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"a floating point image tensor holds values in 0..1, got {low:g} to {high:g}; one in 0..255 is given as "
                "uint8, and the detector normalises by itself"
            )
        image = (image * 255).round().to(torch.uint8)
    return np.ascontiguousarray(image.permute(1, 2, 0).numpy())


def _name(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
