import copy
from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from backbones.classifier import Classifier, ClassifierConfig
from backbones.features import FeatureSpec
from backbones.layers import ConvNormAct, make_divisible, tf_same_padding
from backbones.mobilenetv2 import InvertedResidual, MobileNetV2, MobileNetV2Config
from backbones.weights.native import load_classifier

PAPER_TAIL = ((6, 32, 1, 2), (6, 64, 1, 2), (6, 160, 1, 2))
PAPER_PARTS = ["stem", *(f"stage{number}" for number in range(1, 8)), "last"]


def randomise_norms(model: nn.Module) -> None:
    """Batch norms that would show a mistake: fresh ones are the identity."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    # 1: at least 8. 12 is half way and goes up. 11: 8 would be 73 %, so 16. 44.8 = 32 x 1.4. 22.4 = 64 x 0.35.
    # 33.6 = 24 x 1.4: 32 is 95 %, kept.
    [(1, 8), (8, 8), (12, 16), (11, 16), (44.8, 48), (22.4, 24), (33.6, 32), (1792.0, 1792)],
)
def test_make_divisible(value: float, expected: int) -> None:
    assert make_divisible(value) == expected


@pytest.mark.parametrize(
    ("size", "kernel_size", "stride", "expected"),
    [
        (4, 3, 2, (0, 1)),  # 2 cells: (2 - 1) * 2 + 3 - 4 = 1
        (5, 3, 2, (1, 1)),  # 3 cells: (3 - 1) * 2 + 3 - 5 = 2
        (1, 3, 2, (1, 1)),
        (7, 1, 2, (0, 0)),  # 4 cells: 6 + 1 - 7 = 0
        (8, 1, 2, (0, 0)),  # -1 is no padding
        (8, 5, 2, (1, 2)),
        (6, 3, 1, (1, 1)),
    ],
)
def test_tf_same_padding(size: int, kernel_size: int, stride: int, expected: tuple[int, int]) -> None:
    assert tf_same_padding(size, kernel_size, stride) == expected


def test_tf_same_convolution_by_hand() -> None:
    image = torch.arange(1.0, 17.0).reshape(1, 1, 4, 4)  # rows 1..4, 5..8, 9..12, 13..16
    outputs = {}
    for padding in ("symmetric", "tf_same"):
        layer = ConvNormAct(1, 1, 3, 2, activation=False, padding=padding, norm_eps=1e-12).eval()
        nn.init.ones_(layer.conv.weight)
        outputs[padding] = layer(image)[0, 0].tolist()
    # sums of 3x3 windows: from (0, 0) on, with zeros right and below ...
    assert outputs["tf_same"] == [[54.0, 45.0], [72.0, 54.0]]
    # ... or from (-1, -1) on, with zeros left and above
    assert outputs["symmetric"] == [[14.0, 30.0], [57.0, 99.0]]


@pytest.mark.parametrize("size", [(7, 7), (5, 9)])
def test_paddings_agree_on_odd_sides(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    symmetric = ConvNormAct(3, 4, 3, 2)
    same = ConvNormAct(3, 4, 3, 2, padding="tf_same")
    same.load_state_dict(symmetric.state_dict())
    image = torch.rand(2, 3, *size)
    torch.testing.assert_close(same(image), symmetric(image))


def test_layer_refuses_even_kernel_and_unknown_padding() -> None:
    with pytest.raises(ValueError, match=r"kernel_size is 2; an odd number"):
        ConvNormAct(3, 4, 2)
    with pytest.raises(ValueError, match=r"padding is 'valid'; it can be 'symmetric' or 'tf_same'"):
        ConvNormAct(3, 4, padding="valid")  # type: ignore[arg-type]


def test_parameters_and_multiply_adds_of_the_paper() -> None:
    classifier = Classifier(ClassifierConfig(), 1000).eval()
    assert sum(parameter.numel() for parameter in classifier.parameters()) == 3_504_872
    with torch.device("meta"):
        on_meta = Classifier(ClassifierConfig(), 1000).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            on_meta(torch.empty(1, 3, 224, 224))
    multiply_adds = counter.get_total_flops() / 2
    # convolutions 299.5 M + linear 1.28 M; table 4 of the paper says 300 M
    assert multiply_adds == 300_774_272


@pytest.mark.parametrize(("width", "size"), [(1.0, (97, 130)), (1.0, (224, 224)), (0.5, (97, 130)), (1.4, (97, 130))])
def test_logits_equal_torchvision(width: float, size: tuple[int, int], tmp_path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(width_mult=width, num_classes=37)
    randomise_norms(theirs)
    nn.init.normal_(theirs.classifier[1].weight, std=0.1)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    ours = Classifier(ClassifierConfig(backbone=MobileNetV2Config(width=width)), 37)
    load_classifier(ours, tmp_path / "theirs.pt")
    images = torch.randn(2, 3, *size)
    ours.eval(), theirs.eval()
    with torch.no_grad():
        expected = theirs(images)
        assert expected.std() > 0.01
        torch.testing.assert_close(ours(images), expected, rtol=1e-5, atol=1e-5)


def test_taps_are_torchvisions_by_meaning(tmp_path) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.mobilenet_v2(num_classes=5)
    randomise_norms(theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    classifier = Classifier(ClassifierConfig(), 5)
    load_classifier(classifier, tmp_path / "theirs.pt")
    backbone = MobileNetV2(MobileNetV2Config(), ("last", "stride16_expansion", "stride16_depthwise", "stage5"))
    backbone.load_state_dict(classifier.backbone.state_dict())
    backbone.eval(), theirs.eval()
    caught = {}
    places = {
        "stride16_expansion": theirs.features[14].conv[0],
        "stride16_depthwise": theirs.features[13].conv[1],
        "stage5": theirs.features[13],
        "last": theirs.features[18],
    }
    for name, module in places.items():
        module.register_forward_hook(lambda _module, _input, output, name=name: caught.update({name: output}))
    images = torch.randn(1, 3, 65, 96)
    with torch.no_grad():
        maps = backbone(images)
        theirs(images)
    assert list(maps) == ["last", "stride16_expansion", "stride16_depthwise", "stage5"]
    for name, expected in caught.items():
        torch.testing.assert_close(
            maps[name], expected, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert not torch.allclose(maps["stride16_expansion"], maps["stride16_depthwise"], atol=0.1)


def test_feature_specs_of_table_2() -> None:
    specs = MobileNetV2(MobileNetV2Config()).feature_specs
    assert specs == {
        "stem": FeatureSpec(32, 2),
        "stage1": FeatureSpec(16, 2),
        "stage2": FeatureSpec(24, 4),
        "stage3": FeatureSpec(32, 8),
        "stage4": FeatureSpec(64, 16),
        "stride16_depthwise": FeatureSpec(576, 16),
        "stage5": FeatureSpec(96, 16),
        "stride16_expansion": FeatureSpec(576, 16),
        "stage6": FeatureSpec(160, 32),
        "stage7": FeatureSpec(320, 32),
        "last": FeatureSpec(1280, 32),
    }


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
@pytest.mark.parametrize("residual", ["identity", "projection"])
@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
def test_maps_are_what_the_specs_say(width: float, residual, padding) -> None:
    config = MobileNetV2Config(width=width, residual=residual, padding=padding)
    with torch.device("meta"):
        names = list(MobileNetV2(config).feature_specs)
        backbone = MobileNetV2(config, names)
        for height, width_pixels in [(96, 96), (97, 130), (33, 31), (1, 1)]:
            maps = backbone.eval()(torch.empty(2, 3, height, width_pixels))
            for name, spec in backbone.feature_specs.items():
                cells = (-(-height // spec.stride), -(-width_pixels // spec.stride))
                assert maps[name].shape == (2, spec.channels, *cells), name


def test_last_layer_never_below_1280() -> None:
    assert MobileNetV2(MobileNetV2Config(width=0.35)).feature_specs["last"].channels == 1280
    assert MobileNetV2(MobileNetV2Config(width=1.4)).feature_specs["last"].channels == 1792


def test_settings_without_stride_32_have_no_inner_taps() -> None:
    config = MobileNetV2Config(settings=((1, 16, 1, 1), (6, 24, 1, 2)))
    assert list(MobileNetV2(config).feature_specs) == ["stem", "stage1", "stage2", "last"]


def test_unknown_feature_lists_those_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"asked for the feature 'c4'; there are: stem, stage1, .*stride16_expansion.*last"
    ):
        MobileNetV2(MobileNetV2Config(), ("last", "c4"))
    with pytest.raises(ValueError, match=r"asked for the feature nothing; there are: stem"):
        MobileNetV2(MobileNetV2Config(), ())


def test_residuals() -> None:
    config = MobileNetV2Config()
    assert InvertedResidual(16, 16, 1, 6, config).shortcut is not None
    assert InvertedResidual(16, 24, 1, 6, config).shortcut is None
    assert InvertedResidual(16, 16, 2, 6, config).shortcut is None
    projecting = replace(config, residual="projection")
    block = InvertedResidual(16, 24, 1, 6, projecting)
    assert isinstance(block.shortcut, ConvNormAct)
    assert isinstance(InvertedResidual(16, 16, 1, 6, projecting).shortcut, ConvNormAct)
    assert InvertedResidual(16, 16, 2, 6, projecting).shortcut is None
    # the branch silenced, the output is the shortcut alone
    nn.init.zeros_(block.project.norm.weight)
    image = torch.rand(2, 16, 5, 5)
    torch.testing.assert_close(block(image), block.shortcut(image))
    assert block(image).min() < 0, "no activation at the end of a block"
    # of 17 blocks 10 have an identity; projections are in the 13 of stride 1
    count = sum(
        isinstance(module, nn.Identity) for name, module in MobileNetV2(config).named_modules() if "shortcut" in name
    )
    assert count == 10
    names = [name for name, _ in MobileNetV2(projecting).named_modules() if name.endswith("shortcut")]
    assert len(names) == 13


def test_no_bias_before_a_batch_norm_and_initialisation() -> None:
    torch.manual_seed(0)
    backbone = MobileNetV2(MobileNetV2Config())
    convolutions = [module for module in backbone.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 52
    assert all(conv.bias is None for conv in convolutions)
    # 1x1, 320 -> 1280: fan-out 1280, std sqrt(2 / 1280) = 0.0395
    assert backbone.last.conv.weight.std().item() == pytest.approx(0.0395, rel=0.01)
    assert all(torch.equal(norm.weight, torch.ones_like(norm.weight)) for norm in norms(backbone))
    classifier = Classifier(ClassifierConfig(), 100)
    assert classifier.linear.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert not classifier.linear.bias.any()


def norms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]


def test_frozen_stages_take_no_gradient_and_keep_their_statistics() -> None:
    torch.manual_seed(0)
    backbone = MobileNetV2(MobileNetV2Config(frozen_stages=3), ("stage2", "last"))
    backbone.train()
    before = copy.deepcopy(backbone.state_dict())
    maps = backbone(torch.rand(2, 3, 64, 64))
    assert not maps["stage2"].requires_grad, "no graph is built below the first part that learns"
    assert maps["last"].requires_grad
    maps["last"].sum().backward()
    frozen = ("stem.", "stage1.", "stage2.")
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(frozen), name
    changed = {name for name, tensor in backbone.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert not [name for name in changed if name.startswith(frozen)]
    assert all(norm.training for norm in norms(backbone.stage3))


def test_frozen_norms_stay_frozen_after_train() -> None:
    backbone = MobileNetV2(MobileNetV2Config(freeze_norm=True)).train()
    assert backbone.training
    assert not any(norm.training for norm in norms(backbone))
    assert not any(parameter.requires_grad for norm in norms(backbone) for parameter in norm.parameters())
    assert backbone.last.conv.weight.requires_grad
    inside_another = nn.Sequential(backbone).train()
    assert not any(norm.training for norm in norms(inside_another))


def test_everything_frozen() -> None:
    backbone = MobileNetV2(MobileNetV2Config(frozen_stages=9))
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_parts_behind_the_last_feature_do_not_run() -> None:
    backbone = MobileNetV2(MobileNetV2Config(), ("stage4",))
    assert set(PAPER_PARTS) == {name for name, _ in backbone.named_children()}, "the weights stay complete"
    backbone(torch.rand(2, 3, 32, 32))["stage4"].sum().backward()
    for name, parameter in backbone.named_parameters():
        runs = name.startswith(("stem.", "stage1.", "stage2.", "stage3.", "stage4."))
        assert (parameter.grad is not None) == runs == parameter.requires_grad, name


def test_parts_behind_the_last_feature_can_be_left_out() -> None:
    whole = MobileNetV2(MobileNetV2Config(frozen_stages=9), ("stage3", "stage7"))
    shorter = MobileNetV2(MobileNetV2Config(frozen_stages=9), ("stage3", "stage7"), complete=False)
    assert shorter.left_out == ("last",)
    assert set(shorter.feature_specs) == set(whole.feature_specs) - {"last"}
    assert not any(parameter.requires_grad for parameter in shorter.parameters())
    state = shorter.without_left_out(whole.state_dict())
    assert state.keys() == shorter.state_dict().keys() == whole.state_dict().keys() - whole_last(whole)
    shorter.load_state_dict(state)
    images = torch.rand(1, 3, 64, 64)
    for name, expected in whole.eval()(images).items():
        assert torch.equal(shorter.eval()(images)[name], expected)
    inner = MobileNetV2(
        MobileNetV2Config(), ("stride16_expansion",), complete=False
    )  # inside the first block of stage6
    assert inner.left_out == ("stage7", "last")
    assert list(inner.feature_specs)[-1] == "stage6"


def whole_last(backbone: MobileNetV2) -> set[str]:
    return {key for key in backbone.state_dict() if key.startswith("last.")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 0.0}, r"width is 0.0; it can be 0.1 to 4"),
        ({"settings": ()}, r"settings has 0 rows; 1 to 20 stages"),
        (
            {"settings": ((6, 24, 2, 3),)},
            r"settings row \(6, 24, 2, 3\): t, c, n, s are at least 1 and at most 16, 2048, 64, 2",
        ),
        ({"last_channels": 0}, r"last_channels is 0"),
        ({"residual": "none"}, r"residual is 'none'; it can be 'identity' or 'projection'"),
        ({"padding": "valid"}, r"padding is 'valid'; it can be 'symmetric' or 'tf_same'"),
        ({"norm_eps": 0.0}, r"norm_eps is 0.0"),
        ({"frozen_stages": 10}, r"frozen_stages is 10; it can be 0 \(nothing\) to 9"),
    ],
)
def test_config_refuses(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MobileNetV2(replace(MobileNetV2Config(), **change))


def test_classifier_refuses() -> None:
    with pytest.raises(ValueError, match=r"num_classes is 0; at least 1"):
        Classifier(ClassifierConfig(), 0)
    with pytest.raises(ValueError, match=r"dropout is 1.0"):
        Classifier(ClassifierConfig(dropout=1.0), 2)


@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
def test_compiles_whole_and_runs_under_fake_tensors(padding) -> None:
    names = ("stride16_depthwise", "stride16_expansion", "last")
    config = MobileNetV2Config(padding=padding, width=0.35, settings=((1, 16, 1, 1), (6, 24, 2, 2), *PAPER_TAIL))
    backbone = MobileNetV2(config, names).eval()
    compiled = torch.compile(backbone, fullgraph=True, backend="eager")
    for size in [(64, 96), (97, 130)]:
        images = torch.rand(1, 3, *size)
        with torch.no_grad():
            for name, expected in backbone(images).items():
                torch.testing.assert_close(compiled(images)[name], expected)
    with FakeTensorMode():
        fake = MobileNetV2(MobileNetV2Config(padding=padding), names)
        maps = fake(torch.empty(2, 3, 97, 130))
        assert maps["last"].shape == (2, 1280, 4, 5)


def test_channels_last_is_kept() -> None:
    backbone = MobileNetV2(MobileNetV2Config(padding="tf_same", width=0.35)).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 64, 64).to(memory_format=torch.channels_last)
    assert backbone(images)["last"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("padding", ["symmetric", "tf_same"])
def test_norms_fold_into_convolutions(padding) -> None:
    torch.manual_seed(0)
    layer = ConvNormAct(3, 8, 3, 2, padding=padding)
    randomise_norms(layer)
    layer.eval()
    image = torch.rand(1, 3, 10, 10)
    expected = layer(image)
    layer.conv = fuse_conv_bn_eval(layer.conv, layer.norm)
    layer.norm = nn.Identity()
    torch.testing.assert_close(layer(image), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [MobileNetV2Config(frozen_stages=2), MobileNetV2Config(freeze_norm=True)])
def test_frozen_norms_stay_frozen_as_synchronised_ones(config: MobileNetV2Config) -> None:
    network = MobileNetV2(config).train()
    before = {name: module.training for name, module in network.named_modules()}
    nn.SyncBatchNorm.convert_sync_batchnorm(network).train()
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) == 52
    assert {name: module.training for name, module in network.named_modules()} == before
