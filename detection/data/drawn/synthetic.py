"""The former place of ``detection.data.drawn``."""

from detection.data.drawn import *  # noqa: F403
