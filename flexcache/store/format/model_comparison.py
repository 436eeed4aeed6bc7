"""Differences between the records of two models; needs no torch."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flexcache.errors import MismatchError, StoreError
from flexcache.store.format.model_record import (
    APART,
    CONFIG,
    CONFIG_DIGEST,
    NAMES,
    SAMPLE,
    Record,
    adapters_text,
    as_mapping,
    get_identity,
)

TOLERANCES = {"bfloat16": 6e-2, "float16": 2e-2, "float32": 1e-3, "float64": 1e-6}
"""Differences allowed between two forwards under other conditions, relative to the norm of a group of tokens."""
STEADY = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-5, "float64": 1e-12}
"""The same under equal conditions, for models whose forwards are not repeatable bit for bit."""
BUILT_WITH = ("device", "torch", "transformers")
"""Conditions that may change the bits of tensors that a model computes when it is loaded."""
UNREADABLE = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
SHOWN = 6
CHANGED_MODEL = (
    "load the model as it was, or choose another path for a new store; allow_changed_model=True"
    " (--allow-changed-model) continues anyway, and the ledger records it"
)


def differences(before: Record, now: Record) -> list[str]:
    """Return the differences between the models of two records, in words; empty if they compute the same.

    Two models are the same if their classes, configurations and weights are equal, and if their outputs on the fixed
    input are: bit for bit under equal conditions, within `STEADY` if forwards are not repeatable, and within
    `TOLERANCES` under other conditions. Hooks and classes of modules then do not matter. Records of earlier versions
    are compared by a sample of the weights. StoreError if a record does not have this form.

    >>> differences({"class": "GPT2Model"}, {"class": "LlamaModel"})
    ['class: GPT2Model before, LlamaModel now']
    """
    with _readable():
        found = _differences(before, now)
        names = [adapters_text(record) for record in (before, now)]
        if found and None not in names and names[0] != names[1]:
            found.insert(0, f"adapters: {names[0] or 'none'} before, {names[1] or 'none'} now")
        return found


def structural_differences(one: Record, other: Record) -> list[str]:
    """Return the differences between the structures of two identities, in words."""
    with _readable():
        return _structural(one, other)


@contextmanager
def _readable() -> Iterator[None]:
    """Raise StoreError for a record whose parts are missing or have other types."""
    try:
        yield
    except UNREADABLE as error:
        raise StoreError(
            "the record of a model cannot be read",
            where="provenance.model.identity",
            found=f"{type(error).__name__}: {str(error)[:200]}",
            remedy="restore zarr.json from a copy, or choose another path for a new store",
        ) from error


def _differences(before: Record, now: Record) -> list[str]:
    found = [
        f"{name}: {before.get(name, 'nothing')} before, {now.get(name, 'nothing')} now"
        for name in sorted({*before, *now} - {*APART})
        if before.get(name) != now.get(name)
    ]
    one, other = get_identity(before), get_identity(now)
    if one is None or other is None:
        if before.get(CONFIG_DIGEST) != now.get(CONFIG_DIGEST):
            found.append("config: a digest of it differs")
        samples = before.get(SAMPLE), now.get(SAMPLE)
        if None not in samples and samples[0] != samples[1]:
            found.append("weights: a sample of their values differs")
        return found
    config = _pairs(_flat(one), _flat(other), CONFIG, None)
    if _conditions(one, "transformers") != _conditions(other, "transformers"):  # its versions add and remove keys
        config = [(name, held) for name, held in config if None not in held]
    found += _some([f"config.{name}: {held[0]} before, {held[1]} now" for name, held in config])
    found += _weights(one, other)
    found += _computed(one, other)
    found += _behavior(one.get("behavior"), other.get("behavior"))
    return [*_structural(one, other), *found] if found else []


def _structural(one: Record, other: Record) -> list[str]:
    before, now = (as_mapping(identity.get("structure")) for identity in (one, other))
    found = [
        f"adapter {name}: {held[0]} before, {held[1]} now" for name, held in _pairs(before, now, "adapters", "none")
    ]
    if before.get("quantization") != now.get("quantization"):
        found.append(f"quantization: {before.get('quantization')} before, {now.get('quantization')} now")
    if before.get("hooks") != now.get("hooks"):
        hooks = [", ".join(map(str, held.get("hooks") or [])) or "none" for held in (before, now)]
        found.append(f"hooks: {hooks[0]} before, {hooks[1]} now")
    found += _some(
        [f"modules: {held[0]} × {name} before, {held[1]} now" for name, held in _pairs(before, now, "modules", 0)]
    )
    settings = _pairs(before, now, "settings", {})
    found += _some(
        [f"{name}: {_values(held[0])} before, {_values(held[1])} now" for name, held in settings if all(held)]
    )
    return found


def check_model(
    before: Record, now: Record, where: str, *, allow: bool = False, remedy: str = CHANGED_MODEL
) -> list[str]:
    """Return the differences between the model of a store and the current one; MismatchError unless *allow*.

    >>> check_model({"class": "Linear"}, {"class": "Linear"}, where="run.zarr")
    []
    """
    found = differences(before, now)
    if found and not allow:
        raise MismatchError(
            "the model computes something other than the model that filled the store",
            where=where,
            expected=str(before.get("name") or before.get("class") or "the model of the store"),
            found="\n    ".join(["", *found]),
            remedy=remedy,
        )
    return found


def _weights(one: Record, other: Record) -> list[str]:
    before, now = one.get("weights"), other.get("weights")
    if before == now or before is None or now is None:
        return []
    if one.get("tensors") != other.get("tensors"):
        return [f"weights: {one.get('tensors')} tensors before, {other.get('tensors')} now, or of other names"]
    names: Sequence[str] = other.get(NAMES) or []
    marks = [str(identity.get("marks", "")) for identity in (one, other)]
    changed = [name for at, name in enumerate(names) if marks[0][8 * at :][:8] != marks[1][8 * at :][:8]]
    listed = ", ".join(changed[:SHOWN]) + (", …" if len(changed) > SHOWN else "")
    return [f"weights: {len(changed)} of {len(names)} tensors differ: {listed}" if changed else "weights: they differ"]


def _computed(one: Record, other: Record) -> list[str]:
    """Compare tensors that a model computes on loading, unless they have grown or the device may change their bits."""
    if _conditions(one, *BUILT_WITH) != _conditions(other, *BUILT_WITH):
        return []
    before, now = (as_mapping(identity.get("computed")) for identity in (one, other))
    changed = []
    for name in sorted({*before} & {*now}):
        held, given = set(before[name]), set(now[name])
        shapes = [{text.rpartition(" ")[0] for text in found} for found in (held, given)]
        if held != given and shapes[0] == shapes[1]:
            changed.append(name)
    return [f"buffers: {', '.join(changed[:SHOWN])} differ"] if changed else []


def _behavior(one: Record | None, other: Record | None) -> list[str]:
    if not one or not other or one.get("inputs") != other.get("inputs"):
        return []
    before, now = ({name: at for at, name in enumerate(record["names"])} for record in (one, other))
    common = [name for name in before if name in now]
    if not common:
        return []
    apart = _distances(one, other, common, before, now)
    alike = one.get("conditions") == other.get("conditions")
    if alike and one.get("repeatable") and other.get("repeatable"):
        wrong = [name for name in common if one["bits"][before[name]] != other["bits"][now[name]]]
        rule = "bit for bit, under the same conditions"
    else:
        table = STEADY if alike else TOLERANCES
        tolerance = max(table.get(str(record.get("dtype")), table["float32"]) for record in (one, other))
        wrong = [name for name, distance in zip(common, apart) if not distance <= tolerance]
        rule = f"to {tolerance:g} of their norm, under {'the same' if alike else 'other'} conditions"
    if not wrong:
        return []
    largest = max(distance for name, distance in zip(common, apart) if name in wrong)
    return [
        f"outputs on a fixed input, expected to be equal {rule}: {wrong[0]} is the first of {len(wrong)} of"
        f" {len(common)} that differ, by up to {largest:.2g} of the norm"
    ]


def _distances(one: Record, other: Record, names: list[str], before: Mapping, now: Mapping) -> list[float]:
    """Return the largest difference of the sketches of each output, relative to the norm of a group of tokens."""
    a, b = (_sketches(record)[[at[name] for name in names]] for record, at in ((one, before), (other, now)))
    scale = np.maximum(a[..., 1:], b[..., 1:])
    with np.errstate(invalid="ignore", divide="ignore"):
        relative = np.where(a == b, 0.0, np.abs(a - b) / np.where(scale > 0, scale, 1.0))
    return [float(value) for value in np.nan_to_num(relative, nan=np.inf).max(axis=(1, 2))]


def _sketches(record: Record) -> NDArray[np.float64]:
    content = np.frombuffer(base64.b64decode(record["sketches"]), "<f4")
    return content.reshape(len(record["names"]), -1, 2).astype(np.float64)


def _pairs(before: Record, now: Record, key: str, default: Any) -> list[tuple[str, tuple[Any, Any]]]:
    held, given = as_mapping(before.get(key)), as_mapping(now.get(key))
    pairs = ((name, (held.get(name, default), given.get(name, default))) for name in sorted({*held, *given}))
    return [(name, pair) for name, pair in pairs if pair[0] != pair[1]]


def _conditions(identity: Record, *names: str) -> list[Any]:
    held = as_mapping(as_mapping(identity.get("behavior")).get("conditions"))
    return [held.get(name) for name in names]


def _flat(identity: Record) -> dict[str, dict[str, Any]]:
    """Return the configuration of an identity with dotted names."""
    found: dict[str, Any] = {}

    def add(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, part in value.items():
                add(f"{prefix}.{key}".lstrip("."), part)
        else:
            found[prefix] = json.dumps(value, sort_keys=True)

    add("", identity.get(CONFIG))
    return {CONFIG: found}


def _values(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{value} in {count}" for value, count in counts.items())


def _some(lines: list[str]) -> list[str]:
    return [*lines[:SHOWN], *([f"… and {len(lines) - SHOWN} more of the kind"] if len(lines) > SHOWN else [])]
