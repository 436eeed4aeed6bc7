"""Reading activations inside a model: where they are, and hooks that hand them over."""

from flexcache.hooks.blocks import find_blocks
from flexcache.hooks.identity import check_identity
from flexcache.hooks.locate import locate
from flexcache.hooks.measure import Activation, measure
from flexcache.hooks.tap import Tap
from flexcache.hooks.taps import Taps
from flexcache.hooks.user_hooks import user_hooks

__all__ = ["Activation", "Tap", "Taps", "check_identity", "find_blocks", "locate", "measure", "user_hooks"]
