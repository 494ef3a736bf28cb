"""A detector that rounds to eight bits as it computes, for quantisation-aware fine-tuning (arXiv 1712.05877), by torchao's PT2E.

The network is a graph of ``torch.export`` with the batch norms folded; torchao puts a module behind every convolution, sum,
concatenation and upsampling that rounds and keeps the range, and one before every weight. Weights have seven bits, so that
the sums of pairs of products fit 16 bits on processors with AVX2 and no VNNI.

Letters in shapes: B batch, A anchors, C columns of class logits, D numbers of a box code, H W height and width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import UserError
from detection.engine.quiet import quiet
from detection.models.detector import Detector
from detection.models.folding import fold_norms

_LEAST_STEP = 2**-12  # else the biases of channels whose weights are all but zero overflow in 32 bits
_MOMENTUM = 0.01  # share of the newest batch in the ranges of the activations


class QuantizedDetector(Detector):
    """A detector in eight bits, simulated: it trains, and exports with the ranges that it has learnt.

    In training the ranges follow the batches; in evaluation they stay.

    Args:
        model: gives network and weights; it stays as it is. With two heads the one that predicts is kept.

    Raises:
        UserError: the package torchao is not installed, or the detector has a second head, which training would need.
    """

    PREFIX = "network.model."
    """What the names of the detector's own parameters have before them here."""

    def __init__(self, model: Detector) -> None:
        super().__init__(model.config, model.num_classes)
        if getattr(model.config, "one_to_one", False):
            raise UserError(
                "a detector with a second head (model.one_to_one) cannot be fine-tuned in 8 bits; train one without"
            )
        self.register_buffer("anchors", model.anchors.detach().clone(), persistent=False)
        heads = _Heads(fold_norms(copy.deepcopy(model).cpu().eval()))
        self.network = _prepared(heads, model.config.input_size)
        learns = {name: parameter.requires_grad for name, parameter in heads.named_parameters()}
        for name, parameter in self.network.named_parameters():  # frozen stages stay frozen; a folded bias has no say
            parameter.requires_grad_(learns[f"{name.rpartition('.')[0]}.weight"])
        self.train(model.training)

    def train(self, mode: bool = True) -> QuantizedDetector:
        """Sets the mode. The graph has no layer that behaves differently in training; its ranges are seen to in ``forward``."""
        self.training = mode
        return self

    def codes_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Detector``."""
        self._follow(self.training)
        codes, class_logits = self.network(images)
        return codes, class_logits

    @torch.no_grad()
    def calibrate(self, images: Tensor) -> None:
        """Takes the ranges of a batch, uint8 [B, 3, H, W], as a training step does, and changes no weight."""
        self._follow(True)
        self.network(self.network_input(images))

    def converted(self) -> nn.Module:
        """Normalised images [B, 3, H, W] -> box codes, class logits, with weights and ranges as constants: what is exported."""
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

        with torch.no_grad():
            network: nn.Module = convert_pt2e(copy.deepcopy(self.network))
        return network

    def class_tensors(self) -> frozenset[str]:
        """None are told apart: a detector in eight bits is no start for other classes."""
        return frozenset()

    def parts(self) -> Mapping[str, nn.Module]:
        """See ``Detector``."""
        return {"network": self.network}

    def _follow(self, follows: bool) -> None:
        """Whether the ranges follow the batches and the weights.

        Set in every forward pass, for a moving average copies these flags from the network that is trained.
        """
        from torchao.quantization.pt2e import FakeQuantize

        for module in self.network.modules():
            if isinstance(module, FakeQuantize):
                module.observer_enabled.fill_(int(follows))
                module.activation_post_process.eps.fill_(_LEAST_STEP)  # torchao forgets it where a file is loaded
                if not follows:  # those of a moving average belong to its averaged ranges
                    scale, zero_point = module.calculate_qparams()
                    module.scale.copy_(scale)
                    module.zero_point.copy_(zero_point)


class _Heads(nn.Module):
    """Normalised images -> codes, class logits."""

    def __init__(self, model: Detector) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.codes_and_logits(images)


def _prepared(network: nn.Module, input_size: tuple[int, int]) -> nn.Module:
    """The network as a graph with modules that round."""
    try:
        with quiet("torch.utils._pytree"):  # torchao's first import
            from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
    except ImportError as error:
        raise UserError(
            f"fine-tuning in 8 bits needs the package {error.name}, which is not installed; pip install 'litedet[qat]'"
        ) from error

    images = torch.zeros(2, 3, *input_size).contiguous(memory_format=torch.channels_last)
    shapes = ({0: torch.export.Dim("batch")},)
    graph: Any = torch.export.export(network, (images,), dynamic_shapes=shapes).module()
    prepared: nn.Module = prepare_qat_pt2e(graph, _quantizer())
    with torch.no_grad():  # ranges of the weights get their shapes by the first forward pass
        prepared(images)
    for name, buffer in prepared.named_buffers():  # and those of the activations begin anew
        if name.endswith(".min_val") and buffer.dim() == 0:
            buffer.fill_(float("inf"))
        if name.endswith(".max_val") and buffer.dim() == 0:
            buffer.fill_(float("-inf"))
    return prepared


def _quantizer() -> Any:
    """What tells torchao where to round: see the module's docstring."""
    from torchao.quantization.pt2e import (
        FakeQuantize,
        FusedMovingAvgObsFakeQuantize,
        MovingAverageMinMaxObserver,
        MovingAveragePerChannelMinMaxObserver,
    )
    from torchao.quantization.pt2e.quantizer import (
        QuantizationAnnotation,
        QuantizationSpec,
        Quantizer,
        SharedQuantizationSpec,
    )

    aten = torch.ops.aten
    activation = QuantizationSpec(
        dtype=torch.uint8,
        quant_min=0,
        quant_max=255,
        qscheme=torch.per_tensor_affine,
        observer_or_fake_quant_ctr=FusedMovingAvgObsFakeQuantize.with_args(
            observer=MovingAverageMinMaxObserver, averaging_constant=_MOMENTUM, eps=_LEAST_STEP
        ),
    )
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-64,
        quant_max=63,
        qscheme=torch.per_channel_symmetric,
        ch_axis=0,
        observer_or_fake_quant_ctr=FakeQuantize.with_args(  # the fused kernel has other scales than an export
            observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0, eps=_LEAST_STEP
        ),
    )
    bends = (aten.relu6.default, aten.hardtanh.default, aten.relu.default)
    moves = (
        aten.upsample_nearest2d.vec,
        aten.upsample_nearest2d.default,
        aten.constant_pad_nd.default,
        aten.pad.default,
    )

    def annotate(node: Any, inputs: dict[Any, Any], output: Any) -> None:
        node.meta["quantization_annotation"] = QuantizationAnnotation(
            input_qspec_map=inputs, output_qspec=output, _annotated=True
        )

    class ConvolutionQuantizer(Quantizer):
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            for node in model.graph.nodes:
                follower = next(iter(node.users)) if len(node.users) == 1 else None
                bent = follower is not None and follower.target in bends
                if node.target in (aten.conv2d.default, aten.conv2d.padding):
                    annotate(node, {node.args[0]: activation, node.args[1]: weight}, None if bent else activation)
                elif node.target in bends:
                    annotate(node, {}, activation)
                elif node.target == aten.add.Tensor and all(isinstance(one, torch.fx.Node) for one in node.args[:2]):
                    annotate(node, dict.fromkeys(node.args[:2], activation), None if bent else activation)
                elif node.target == aten.cat.default and node.meta["val"].dim() == 4:
                    # One range for all would be the mean of theirs, as the moving average goes, and cut the largest.
                    annotate(node, dict.fromkeys(node.args[0], activation), activation)
                elif node.target in moves:
                    annotate(node, {node.args[0]: activation}, SharedQuantizationSpec((node.args[0], node)))
            return model

        def validate(self, model: torch.fx.GraphModule) -> None:
            pass

    return ConvolutionQuantizer()
