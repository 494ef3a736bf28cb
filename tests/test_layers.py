"""The activation that is written over its input. Run: pytest tests/test_layers.py"""

import torch
import torch.nn.functional as F

from backbones.layers import ConvNormAct, ReLU6


def test_relu6_has_the_values_and_gradients_of_torchs() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 6.0, 7.0, 3.0], requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    (ReLU6()(x * 1) * weight).sum().backward()
    assert torch.equal(ReLU6()(x.detach().clone()), torch.tensor([0.0, 0.0, 0.5, 6.0, 6.0, 3.0]))
    assert torch.equal(x.grad, torch.tensor([0.0, 0.0, 3.0, 0.0, 0.0, 6.0]))
    own, x.grad = x.grad, None
    (F.relu6(x) * weight).sum().backward()
    assert torch.equal(x.grad, own)


def test_relu6_is_written_over_its_input() -> None:
    x = torch.randn(4)
    assert ReLU6()(x).data_ptr() == x.data_ptr()


def test_a_layer_keeps_one_activation_for_the_backward_pass_besides_its_input() -> None:
    layer = ConvNormAct(4, 8, 3).train()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum().backward()
    # The convolution keeps its input, the norm the convolution's output, the activation its own result, which the next
    # convolution keeps as well. torch's in-place ReLU6 would keep a fourth map of its own.
    maps = sorted(numel for numel in kept.values() if numel >= x.numel())
    assert maps == [2 * 4 * 256, 2 * 8 * 256, 2 * 8 * 256]


def test_compiled_and_eager_agree() -> None:
    torch.manual_seed(0)
    layer, x = ConvNormAct(3, 8, 3).train(), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    compiled.sum().backward()
    gradient, layer.conv.weight.grad = layer.conv.weight.grad, None
    layer(x).sum().backward()
    torch.testing.assert_close(layer.conv.weight.grad, gradient)
