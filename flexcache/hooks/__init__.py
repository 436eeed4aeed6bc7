"""Hooks: find sites in a model, read them, edit them, and check that they are what their names say."""

from flexcache.hooks.checks.residual_checks import check_sites
from flexcache.hooks.flexmodel import edits
from flexcache.hooks.flexmodel.flex_model import FlexModel
from flexcache.hooks.flexmodel.hook_function import HookFunction
from flexcache.hooks.locate.blocks import find_blocks
from flexcache.hooks.locate.hook_point import HookPoint
from flexcache.hooks.locate.site_search import find_hook_points
from flexcache.hooks.read.activation_hooks import ActivationHooks
from flexcache.hooks.read.measure import Activation, measure
from flexcache.hooks.read.user_hooks import user_hooks

__all__ = [
    "Activation",
    "ActivationHooks",
    "FlexModel",
    "HookFunction",
    "HookPoint",
    "check_sites",
    "edits",
    "find_blocks",
    "find_hook_points",
    "measure",
    "user_hooks",
]
