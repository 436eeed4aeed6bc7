"""Reading activations inside a model: where they are, and hooks that hand them over."""

from flexcache.hooks.checks.identity import check_identity
from flexcache.hooks.flexmodel.flex_model import FlexModel
from flexcache.hooks.flexmodel.hook_function import HookFunction
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.search import find_hook_points
from flexcache.hooks.read.activation_hooks import ActivationHooks
from flexcache.hooks.read.measure import Activation, measure
from flexcache.hooks.read.user_hooks import user_hooks

__all__ = [
    "Activation",
    "ActivationHooks",
    "FlexModel",
    "HookFunction",
    "HookPoint",
    "check_identity",
    "find_blocks",
    "find_hook_points",
    "measure",
    "user_hooks",
]
