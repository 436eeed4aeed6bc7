"""Results of small forwards that check a model, kept while the model lives in this process."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from types import FunctionType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import xxhash
from torch import nn
from torch.nn.modules import module as torch_module

from flexcache.recording.forward.batch import Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.spec import CaptureSpec
from flexcache.store.format.model_record import IDENTITY

Result = TypeVar("Result")

Code = frozenset[tuple[Hashable, ...]]
_passed: WeakKeyDictionary[nn.Module, dict[tuple[str, str, Code], Any]] = WeakKeyDictionary()


class PassedChecks:
    """The checks of one model at some targets: each runs once in a process, until the model or the targets change.

    A model is the same if it is the same object; its classes have the same methods, and the modules that define them
    the same functions; its modules hold the same values; and its record is equal, for which each capture reads all
    weights and settings, and runs a small forward. Nothing is kept for a model on several processes, which check
    together; for one with hooks or replaced forwards, or an objective, whose functions may change; or for one that
    cannot run the forward of the record.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Mapping[str, Any],
        targets: CaptureTargets,
        spec: CaptureSpec,
        pad: Padding,
        alone: bool,
    ) -> None:
        identity = record.get(IDENTITY) or {}
        everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
        hooked = identity.get("structure", {}).get("hooks") or everywhere
        self._keeps = alone and targets.objective is None and not hooked and identity.get("behavior") is not None
        told = [
            record,
            sorted(_held_values(model)),
            [repr(point) for point in targets.points],
            spec.isolated,
            spec.max_length,
            spec.batch_tokens,
        ]
        text = json.dumps([*told, pad if isinstance(pad, int) else None], sort_keys=True, default=str)
        self._model, self._key = model, (xxhash.xxh3_128_hexdigest(text.encode()), frozenset(_functions(model)))

    def run_once(self, name: str, check: Callable[[], Result]) -> Result:
        """Return the result of a check, from an earlier capture if the model passed it; errors are not kept."""
        if not self._keeps:
            return check()
        results, key = _passed.setdefault(self._model, {}), (name, *self._key)
        if key not in results:
            results[key] = check()
        found: Result = results[key]
        return found


def _functions(model: nn.Module) -> Iterator[tuple[Hashable, ...]]:
    """Yield the methods of a model's classes, and the functions of their modules, also those in mappings, with names.

    So a replaced function that makes masks, or computes attention, is noticed.
    """
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    scopes = {scope for kind in kinds if (scope := sys.modules.get(kind.__module__)) is not None}
    for holder in (*kinds, *scopes):
        for name, value in list(vars(holder).items()):
            if isinstance(value, FunctionType):
                yield holder, name, value
            elif isinstance(value, Mapping) and holder in scopes:
                yield from ((holder, name, *pair) for pair in list(value.items()) if isinstance(pair[1], FunctionType))


def _held_values(model: nn.Module) -> set[str]:
    """Return the containers that modules hold, as text; numbers and texts are in the record."""
    held = (vars(module).items() for module in model.modules())
    kinds = dict | list | tuple | set
    return {
        f"{key}: {value!r}" for items in held for key, value in items if key[:1] != "_" and isinstance(value, kinds)
    }
