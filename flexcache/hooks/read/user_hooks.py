"""Which modules of a live model the user has changed, for the provenance of a store."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from flexcache.hooks.locate.names import modules

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
"""Packages whose hooks belong to how a model is loaded or distributed, not to what it computes."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def user_hooks(model: nn.Module) -> list[str]:
    """Return the paths of modules with forward hooks, or a replaced ``forward``, that no library put there.

    Such a model may compute something other than its weights say. The hooks of open `ActivationHooks` only read, and do
    not count; the root is named ``"(model)"``.
    """
    return list(dict.fromkeys(name or "(model)" for name, _ in user_changes(model)))


def user_changes(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the path of each module, and each forward hook or replaced ``forward`` that no library put there."""
    return [
        (name, change) for name, module in modules(model).items() for change in _changes(module) if _of_user(change)
    ]


def _changes(module: nn.Module) -> list[Any]:
    replaced = vars(module).get("forward")
    return [hook for kind in HOOKS for hook in getattr(module, kind).values()] + ([replaced] if replaced else [])


def _of_user(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.partition(".")[0] not in LIBRARIES and origin != "flexcache.hooks.read.activation_hooks"
