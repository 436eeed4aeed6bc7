"""Virtual layers: rows that were computed and hashed at the capture, and are recomputed when they are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.virtual.attachment import Attachment, AttachOptions, attach
    from flexcache.virtual.explain import ReadPlan

__all__ = ["AttachOptions", "Attachment", "ReadPlan", "attach"]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {name: f"flexcache.virtual.attachment:{name}" for name in ("AttachOptions", "Attachment", "attach")}
    | {"ReadPlan": "flexcache.virtual.explain:ReadPlan"},
)
