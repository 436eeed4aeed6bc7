"""The fingerprint of a forward: the conditions, other than model and plan, on which its bits depend."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from flexcache.errors import MismatchError
from flexcache.recording.run.existing_rows import EXISTING_ROWS
from flexcache.store.format.model_comparison import structural_differences
from flexcache.store.format.model_record import IDENTITY, get_identity
from flexcache.store.read.store import Store
from flexcache.store.storage.location import StoreLocation

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "flexcache-activations",
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "zarr",
    "pyarrow",
    "tokenizers",
)


def fingerprint(model: torch.nn.Module, tensor: int = 1) -> dict[str, Any]:
    """Return device, thread count, attention kernel and versions: processes with equal ones compute equal bytes.

    The thread count changes bits of bfloat16 on a CPU, the version of torch those of any kernel, and *tensor*
    parallelism the order in which sums over shards of the weights are taken.
    """
    import torch

    from flexcache.hooks.locate.names import unwrap_model
    from flexcache.hooks.read.measure import input_device

    parameter = next(model.parameters(), torch.empty(0))
    root = unwrap_model(model)
    device = input_device(model)
    on_cpu = device.type == "cpu"
    return {
        "device": torch.backends.cpu.get_cpu_capability() if on_cpu else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else 0,
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "attention": str(getattr(getattr(root, "config", None), "_attn_implementation", None)),
        "compute_dtype": str(parameter.dtype).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        **({"tensor_parallel": tensor} if tensor > 1 else {}),
    }


def model_notices(before: Mapping[str, Any], now: dict[str, Any], accepted: list[str]) -> list[str]:
    """Return lines for the user about a model that resumes a store which another one began."""
    if accepted:
        return ["the model is not the one of the store, as was allowed; the ledger says so:", *accepted]
    if get_identity(before) is None:
        return ["the store was begun by an earlier version: its model was compared by a sample of the weights only"]
    return [
        f"{line}; outputs on the fixed input are equal"
        for line in structural_differences(before[IDENTITY], now[IDENTITY])
    ]


def check_fingerprint(store: Store, now: dict[str, Any], allow_mixed: bool) -> None:
    """Raise MismatchError if the latest unit of a store has another fingerprint than *now*, unless *allow_mixed*."""
    if allow_mixed:
        return
    units = store.ledger.units()
    if units:
        check_alike(store.path, store.ledger.read_record(units[-1]).fingerprint, now, "the store was begun")


def check_alike(path: StoreLocation, earlier: dict[str, Any], now: dict[str, Any], who: str) -> None:
    """Raise MismatchError if two fingerprints of one store differ."""
    different = [
        f"{name}: {earlier.get(name)} before, {now.get(name)} now"
        for name in sorted({*earlier, *now} - {EXISTING_ROWS} - ({"model"} if "model" in now else set()))
        if earlier.get(name) != now.get(name)
    ]
    if different == [f"model: {earlier.get('model')} before, None now"]:
        raise MismatchError(
            f"{who} with another model than its own, which was allowed then",
            where=str(path),
            remedy="delete the ledger records of the units whose fingerprint has a model, to compute them again; or"
            " allow mixing (allow_mixed=True, --allow-mixed)",
        )
    if different:
        raise MismatchError(
            f"{who} under other conditions, which may change the bits of activations",
            where=str(path),
            found="; ".join(different),
            remedy="resume under the same conditions, or allow mixing (allow_mixed=True, --allow-mixed): the"
            " ledger records which unit had which",
        )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages on which results depend."""
    found = {name: _version(name) for name in PACKAGES}
    return {"python": sys.version.split()[0], **{name: text for name, text in found.items() if text}}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
