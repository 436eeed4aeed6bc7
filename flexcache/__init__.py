"""FlexCache: cache what happens inside a transformer once, and study it without the model.

    flexcache.capture(model, tokenizer, documents, "run.zarr", sites=["resid_post"])
    store = flexcache.open("run.zarr")
    store["resid_post"]                     # xarray.DataArray (layer, token, hidden), lazy

Opening and reading need no torch; `capture` does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import flexcache.store.format.bfloat16  # noqa: F401 - registers the data type with zarr
from flexcache.errors import FlexCacheError
from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache import exchange, training
    from flexcache.chat_options import ChatOptions
    from flexcache.documents import Documents, open_documents
    from flexcache.exchange import export, import_folder
    from flexcache.hooks import FlexModel, HookFunction
    from flexcache.model import ModelSource
    from flexcache.options import Choice, Generation, Packing, Windows
    from flexcache.recording import LogitDifference, NextTokenLoss, Recorder, Transform
    from flexcache.recording.capture import capture
    from flexcache.recording.extend import extend
    from flexcache.recording.external_forward import record
    from flexcache.recording.generate import generate
    from flexcache.recording.recompute import recompute
    from flexcache.recording.run_options import RunOptions
    from flexcache.recording.variants import capture_variants
    from flexcache.site import Site
    from flexcache.spec import CaptureSpec
    from flexcache.store import Removal, Store, copy, merge, repair, verify
    from flexcache.store import Store as open  # noqa: N813
    from flexcache.virtual import Filling, Thinning, attach, fill, thin

__version__ = "0.1.0"
__all__ = [
    "CaptureSpec",
    "ChatOptions",
    "Choice",
    "Documents",
    "Filling",
    "FlexCacheError",
    "FlexModel",
    "Generation",
    "HookFunction",
    "LogitDifference",
    "ModelSource",
    "NextTokenLoss",
    "Packing",
    "Recorder",
    "Removal",
    "RunOptions",
    "Site",
    "Store",
    "Thinning",
    "Transform",
    "Windows",
    "attach",
    "capture",
    "capture_variants",
    "copy",
    "exchange",
    "export",
    "extend",
    "fill",
    "generate",
    "import_folder",
    "merge",
    "open",
    "open_documents",
    "recompute",
    "record",
    "repair",
    "thin",
    "training",
    "verify",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "CaptureSpec": "flexcache.spec:CaptureSpec",
        "ChatOptions": "flexcache.chat_options:ChatOptions",
        "capture_variants": "flexcache.recording.variants:capture_variants",
        "FlexCacheError": "flexcache.errors:FlexCacheError",
        "ModelSource": "flexcache.model:ModelSource",
        "RunOptions": "flexcache.recording.run_options:RunOptions",
        "Site": "flexcache.site:Site",
        "open": "flexcache.store:Store",
        "exchange": "flexcache.exchange",
        "record": "flexcache.recording.external_forward:record",
        "training": "flexcache.training",
    }
    | {name: f"flexcache.virtual:{name}" for name in ("Filling", "Thinning", "attach", "fill", "thin")}
    | {name: f"flexcache.documents:{name}" for name in ("Documents", "open_documents")}
    | {name: f"flexcache.exchange:{name}" for name in ("export", "import_folder")}
    | {name: f"flexcache.hooks:{name}" for name in ("FlexModel", "HookFunction")}
    | {name: f"flexcache.options:{name}" for name in ("Choice", "Generation", "Packing", "Windows")}
    | {name: f"flexcache.recording:{name}" for name in ("LogitDifference", "NextTokenLoss", "Recorder", "Transform")}
    | {name: f"flexcache.recording.{name}:{name}" for name in ("capture", "extend", "generate", "recompute")}
    | {name: f"flexcache.store:{name}" for name in ("Removal", "Store", "copy", "merge", "repair", "verify")},
)
