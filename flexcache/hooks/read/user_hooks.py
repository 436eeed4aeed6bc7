"""Modules of a live model that the user has changed, for the provenance of a store."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from flexcache.hooks.locate.names import modules_by_path
from flexcache.hooks.read import activation_hooks

LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed")
"""Packages whose hooks load or distribute a model and do not change what it computes."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def user_hooks(model: nn.Module) -> list[str]:
    """Return the paths of modules with forward hooks, or a replaced ``forward``, that no library added.

    Such a model may compute something other than its weights imply. Hooks of `ActivationHooks` only read, and are not
    counted. The root is named ``"(model)"``.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> _ = model[0].register_forward_hook(lambda module, args, output: 0 * output)
    >>> user_hooks(model)
    ['0']
    """
    return list(dict.fromkeys(name or "(model)" for name, _ in user_changes(model)))


def user_changes(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the module path and the function of each forward hook or replaced ``forward`` that no library added."""
    return [
        (name, change)
        for name, module in modules_by_path(model).items()
        for change in _changes(module)
        if _of_user(change)
    ]


def _changes(module: nn.Module) -> list[Any]:
    replaced = vars(module).get("forward")
    return [hook for kind in HOOKS for hook in getattr(module, kind).values()] + ([replaced] if replaced else [])


def _of_user(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    origin = getattr(hook, "__module__", None) or type(hook).__module__
    return origin.partition(".")[0] not in LIBRARIES and origin != activation_hooks.__name__
