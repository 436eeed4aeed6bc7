"""Compare what a store was made from with what a call is given."""

from __future__ import annotations

from typing import Any

from flexcache.documents.digest import DIGEST
from flexcache.errors import MismatchError
from flexcache.identity import check_model, differences
from flexcache.store.format.text import join_lines
from flexcache.store.storage.location import StoreLocation

DOCUMENTS_DIGEST = f"documents.{DIGEST}"


def check_same(
    stored: dict[str, Any], given: dict[str, Any], path: StoreLocation, *, allow_changed_model: bool = False
) -> list[str]:
    """Return the differences between the model of a store and the given one, if they are allowed.

    Raises
    ------
    MismatchError
        Anything but the model differs, or the model differs and *allow_changed_model* is False. The error lists the
        values.
    """
    stored_model, model = (part.get("model") or {} for part in (stored, given))
    before, now = (_flat({key: part for key, part in held.items() if key != "model"}) for held in (stored, given))
    for held in (before, now):
        held.pop("spec.objective.tokens", None)  # stores of an earlier version lack them; the state covers them
    budget = "spec.batch_tokens"
    if None in (before.get(DOCUMENTS_DIGEST), now.get(DOCUMENTS_DIGEST)):  # of an earlier version, or of a generator
        before.pop(DOCUMENTS_DIGEST, None)
        now.pop(DOCUMENTS_DIGEST, None)
    if now.get(budget, 0) < before.get(budget, 0):
        now[budget] = before[budget]  # smaller forward passes over the same plan
    different = [
        f"{name}: {before.get(name, 'nothing')} in the store, {now.get(name, 'nothing')} now"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if different:
        different += differences(stored_model, model)
        raise MismatchError(
            "the store was made from something else",
            where=str(path),
            found=join_lines(different),
            remedy="give the same configuration to resume it, or another path for a new store",
        )
    return check_model(stored_model, model, str(path), allow=allow_changed_model)


def stored_identity(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return the parts of `PlanInputs.identity` from the attributes of a store."""
    provenance = attributes["provenance"]
    return {
        "spec": attributes["spec"],
        "arrays": attributes["arrays"],
        "model": provenance["model"],
        "tokenizer": provenance["tokenizer"],
        "documents": provenance["documents"],
    }


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for name, part in value.items() for k, v in _flat(part, f"{path}.{name}".lstrip(".")).items()}
    return {path: value}
