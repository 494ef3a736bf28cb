"""From a config to its detector, with one entry for each kind of detector."""

from collections.abc import Mapping
from typing import Any

from backbones.errors import UserError
from detection.models.detector import Detector, DetectorConfig
from detection.models.litedet import LiteDet, LiteDetConfig
from detection.models.ssdlite import SSDLite, SSDLiteConfig

_CONFIGS: dict[str, type[DetectorConfig]] = {"ssdlite": SSDLiteConfig, "litedet": LiteDetConfig}


def build_detector(config: DetectorConfig, num_classes: int) -> Detector:
    """The network of a config.

    Args:
        config: of any kind that this file lists.
        num_classes: classes without the background, at least 1.

    Raises:
        UserError: a config value makes no sense.
        TypeError: a config of a kind that this file does not list.
    """
    if isinstance(config, SSDLiteConfig):
        return SSDLite(config, num_classes)
    if isinstance(config, LiteDetConfig):
        return LiteDet(config, num_classes)
    raise TypeError(f"no detector is built from a {type(config).__name__}")


def config_type(plain: Mapping[str, Any]) -> type[DetectorConfig]:
    """The dataclass for a config that was read from a file. Older files name no kind; they hold SSDLite.

    Raises:
        UserError: a kind that this version does not know.
    """
    kind = plain.get("kind", "ssdlite")
    if not isinstance(kind, str) or kind not in _CONFIGS:
        raise UserError(f"this is a detector of kind {kind!r}; this version knows {', '.join(_CONFIGS)}")
    return _CONFIGS[kind]
