"""Networks for tests: narrow, and shallow, with a layer of each kind (a block without expansion, one with a residual, strides).

An export, a fold or a training step takes a time that grows with the number of layers, and shows with half of them what it
shows with all. Table 2 of the paper at its full depth is built, counted and exported where that is what a test is about.
"""

from itertools import chain

from backbones.mobilenetv2 import MobileNetV2Config

BACKBONE = MobileNetV2Config(
    width=0.35,
    settings=(
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 1, 2),
        (6, 64, 1, 2),
        (6, 96, 1, 1),
        (6, 160, 1, 2),
        (6, 320, 1, 1),
    ),
)
EXTRA_CHANNELS = (128, 64)
"""Of SSDLite's maps after the backbone's last: two, not four."""

BACKBONE_FLAGS = (
    *("--model.backbone.width", str(BACKBONE.width), "--model.backbone.frozen-stages", "0"),
    *("--model.backbone.settings", *map(str, chain(*BACKBONE.settings))),
)
SSDLITE_FLAGS = (*BACKBONE_FLAGS, "--model.extra-channels", *map(str, EXTRA_CHANNELS))
"""The same for a command line."""
