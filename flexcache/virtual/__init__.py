"""Virtual layers: rows that were computed and hashed at the capture, and are recomputed when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.virtual.attachment import Attachment, AttachOptions, attach
    from flexcache.virtual.filling import Filling, fill
    from flexcache.virtual.plan import ReadPlan
    from flexcache.virtual.thinning import Thinning, thin

__all__ = ["AttachOptions", "Attachment", "Filling", "ReadPlan", "Thinning", "attach", "fill", "thin"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {name: f"flexcache.virtual.attachment:{name}" for name in ("AttachOptions", "Attachment", "attach")}
    | {name: f"flexcache.virtual.filling:{name}" for name in ("Filling", "fill")}
    | {name: f"flexcache.virtual.thinning:{name}" for name in ("Thinning", "thin")}
    | {"ReadPlan": "flexcache.virtual.plan:ReadPlan"},
)
