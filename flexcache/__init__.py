"""FlexCache: cache what happens inside a transformer once, and study it ever after without the model.

    flexcache.capture(model, tokenizer, documents, "run.zarr", sites=["resid_post"])
    store = flexcache.open("run.zarr")
    store["resid_post"]                     # xarray.DataArray (layer, token, hidden), lazy

Opening and reading need no torch; `capture` does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import flexcache.store.format.bfloat16  # noqa: F401 - so that zarr opens our arrays wherever flexcache is imported
from flexcache.errors import FlexCacheError

if TYPE_CHECKING:
    from flexcache.documents import Documents, open_documents
    from flexcache.hooks import FlexModel, HookFunction
    from flexcache.model import ModelSource
    from flexcache.options import Choice, Generation, Packing, Windows
    from flexcache.recording.capture import capture
    from flexcache.recording.extend import extend
    from flexcache.recording.external_forward import record
    from flexcache.recording.forward.objective import LogitDifference, NextTokenLoss
    from flexcache.recording.forward.transform import Transform
    from flexcache.recording.generate import generate
    from flexcache.recording.recompute import recompute
    from flexcache.recording.run.recorder import Recorder
    from flexcache.store.manage.repair import repair
    from flexcache.store.manage.verify import verify
    from flexcache.store.read.store import Store
    from flexcache.store.read.store import Store as open  # noqa: N813

__version__ = "0.1.0"
__all__ = [
    "Choice",
    "Documents",
    "FlexCacheError",
    "FlexModel",
    "Generation",
    "HookFunction",
    "LogitDifference",
    "ModelSource",
    "NextTokenLoss",
    "Packing",
    "Recorder",
    "Store",
    "Transform",
    "Windows",
    "capture",
    "extend",
    "generate",
    "open",
    "open_documents",
    "recompute",
    "record",
    "repair",
    "training",
    "verify",
]

_PLACES = {
    "Choice": "flexcache.options:Choice",
    "Documents": "flexcache.documents:Documents",
    "FlexModel": "flexcache.hooks:FlexModel",
    "Generation": "flexcache.options:Generation",
    "HookFunction": "flexcache.hooks:HookFunction",
    "LogitDifference": "flexcache.recording.forward.objective:LogitDifference",
    "ModelSource": "flexcache.model:ModelSource",
    "NextTokenLoss": "flexcache.recording.forward.objective:NextTokenLoss",
    "Packing": "flexcache.options:Packing",
    "Recorder": "flexcache.recording.run.recorder:Recorder",
    "Store": "flexcache.store.read.store:Store",
    "Transform": "flexcache.recording.forward.transform:Transform",
    "Windows": "flexcache.options:Windows",
    "capture": "flexcache.recording.capture:capture",
    "extend": "flexcache.recording.extend:extend",
    "generate": "flexcache.recording.generate:generate",
    "open": "flexcache.store.read.store:Store",
    "open_documents": "flexcache.documents:open_documents",
    "recompute": "flexcache.recording.recompute:recompute",
    "record": "flexcache.recording.external_forward:record",
    "repair": "flexcache.store.manage.repair:repair",
    "training": "flexcache.training",
    "verify": "flexcache.store.manage.verify:verify",
}


def __getattr__(name: str) -> Any:
    """Import public names when they are first used, so that `import flexcache` is quick."""
    if name not in _PLACES:
        raise AttributeError(f"module 'flexcache' has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
