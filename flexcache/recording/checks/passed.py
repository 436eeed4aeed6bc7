"""Results of small forwards that check a model, kept while the model lives in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import xxhash
from torch import nn

from flexcache.recording.forward.batch import Padding
from flexcache.recording.forward.capture_targets import CaptureTargets
from flexcache.spec import CaptureSpec
from flexcache.store.format.model_record import IDENTITY

Result = TypeVar("Result")

Forwards = frozenset[Any]
_passed: WeakKeyDictionary[nn.Module, dict[tuple[str, str, Forwards], Any]] = WeakKeyDictionary()


class PassedChecks:
    """The checks of one model at some targets: each runs once in a process, until the model or the targets change.

    A model is the same if it is the same object, its classes have the same forwards, and its record is equal, for which
    each capture reads all weights and settings, and runs a small forward. Nothing is kept for a model on several
    processes, which check together; for one with hooks or replaced forwards, or an objective, whose functions may
    change; or for one that cannot run the forward of the record.
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
        hooked = identity.get("structure", {}).get("hooks")
        self._keeps = alone and targets.objective is None and not hooked and identity.get("behavior") is not None
        told = [record, [repr(point) for point in targets.points], spec.isolated, spec.max_length, spec.batch_tokens]
        text = json.dumps([*told, pad if isinstance(pad, int) else None], sort_keys=True, default=str)
        forwards = frozenset(type(module).forward for module in model.modules())
        self._model, self._key = model, (xxhash.xxh3_128_hexdigest(text.encode()), forwards)

    def run_once(self, name: str, check: Callable[[], Result]) -> Result:
        """Return the result of a check, from an earlier capture if the model passed it; errors are not kept."""
        if not self._keeps:
            return check()
        results, key = _passed.setdefault(self._model, {}), (name, *self._key)
        if key not in results:
            results[key] = check()
        found: Result = results[key]
        return found
