"""Reading activations inside a model: where they are, and hooks that hand them over."""

from flexcache.hooks.blocks import find_blocks
from flexcache.hooks.flex_model import FlexModel
from flexcache.hooks.hook_function import HookFunction
from flexcache.hooks.identity import check_identity
from flexcache.hooks.locate import locate
from flexcache.hooks.measure import Activation, measure
from flexcache.hooks.tap import Tap
from flexcache.hooks.taps import Taps
from flexcache.hooks.user_hooks import user_hooks

__all__ = [
    "Activation",
    "FlexModel",
    "HookFunction",
    "Tap",
    "Taps",
    "check_identity",
    "find_blocks",
    "locate",
    "measure",
    "user_hooks",
]
