"""Layers by what eight bits cost in them. Run: pytest tests/test_sensitivity.py"""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbones.errors import UserError
from detection.export.module import Network
from detection.export.sensitivity import LayerError, as_lines, chosen_layers, layer_errors, layers_of


class Two(nn.Module):
    """The first convolution has a weight that dwarfs the others of its channel, so that eight bits round these to nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 2, 1)
        self.unused = nn.Conv2d(4, 2, 1)
        with torch.no_grad():
            self.first.weight[:, 0] = 1000.0
            self.first.bias.zero_()

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = images.float() / 255
        x = torch.cat((x[:, :1] * 0, x[:, 1:]), 1)  # the large weight meets zeros
        return (self.second(self.first(x)),)


@pytest.fixture
def network() -> Network:
    return Network(module=Two().eval(), input_size=(4, 4), outputs=("out",))


def test_the_spoilt_layer_comes_first(network: Network) -> None:
    assert list(layers_of(network)) == ["first", "second"]
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    with torch.no_grad():
        before = network.module(torch.from_numpy(images))[0]
    errors = layer_errors(network, images)
    assert [one.name for one in errors] == ["first", "second"]
    # Steps of 1000 / 127: every other weight of the first layer, at most 0.58, becomes 0, and the signal is gone.
    assert errors[0].decibels < 1
    assert errors[1].decibels > 30
    with torch.no_grad():
        assert torch.equal(network.module(torch.from_numpy(images))[0], before)
    assert as_lines(errors)[1].startswith("  first ")


def test_layers_are_chosen_by_number_and_by_name() -> None:
    errors = [LayerError(name=name, decibels=0.0) for name in ("model.a.conv", "model.b.conv", "model.head.0")]
    assert chosen_layers(("2",), errors) == ("model.a.conv", "model.b.conv")
    assert chosen_layers(("head.0", "model.a.conv"), errors) == ("model.head.0", "model.a.conv")
    with pytest.raises(UserError, match="--keep-float 4: the network has 3 layers"):
        chosen_layers(("4",), errors)
    with pytest.raises(UserError, match="--keep-float conv names 2 layers"):
        chosen_layers(("conv",), errors)
    with pytest.raises(UserError, match=r"--keep-float c names no layer; the worst are model\.a\.conv"):
        chosen_layers(("c",), errors)
