"""A module around a model that has the model's attributes, parameters and state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flexcache.hooks.locate.names import unwrap_model

TRAINABLE = "trainable_modules"


class ModelWrapper(nn.Module):
    """Pass attributes, parameters, buffers and state through to a model, and add those of its trainable modules.

    Attributes
    ----------
    module : Module
        The model.
    trainable_modules : ModuleDict
        Modules that are trained along with the model; their state has the prefix ``trainable_modules.``.
    """

    _own_attributes: ClassVar[tuple[str, ...]] = ("module",)

    def __init__(self, module: nn.Module, trainable_modules: nn.ModuleDict) -> None:
        super().__init__()
        self.module = module
        self.trainable_modules = trainable_modules

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self._own_attributes or name.startswith("__"):
                raise
            module = self._modules.get("module")
            for holder in (module, unwrap_model(module)) if module is not None else ():
                try:
                    return getattr(holder, name)
                except AttributeError:
                    continue
            raise

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the model's parameters under its own names, then those of trainable modules."""
        if recurse:
            yield from self.module.named_parameters(prefix, recurse, remove_duplicate)
            yield from self.trainable_modules.named_parameters(_join(prefix, TRAINABLE), recurse, remove_duplicate)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the model's buffers under its own names, then those of trainable modules."""
        if recurse:
            yield from self.module.named_buffers(prefix, recurse, remove_duplicate)
            yield from self.trainable_modules.named_buffers(_join(prefix, TRAINABLE), recurse, remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the model's state under its own names, and that of trainable modules under ``trainable_modules.``."""
        state = self.module.state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        return self.trainable_modules.state_dict(destination=state, prefix=f"{prefix}{TRAINABLE}.", keep_vars=keep_vars)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the result of `state_dict`; without trainable modules, the state of the model alone is enough."""
        head = f"{TRAINABLE}."
        added = {name.removeprefix(head): value for name, value in state_dict.items() if name.startswith(head)}
        own = {name: value for name, value in state_dict.items() if not name.startswith(head)}
        first = self.module.load_state_dict(own, strict=strict, assign=assign)
        second = self.trainable_modules.load_state_dict(added, strict=strict, assign=assign)
        return type(first)(
            [*first.missing_keys, *(head + name for name in second.missing_keys)],
            [*first.unexpected_keys, *(head + name for name in second.unexpected_keys)],
        )


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name
