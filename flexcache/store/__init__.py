"""Stores: the disk format, reading, writing, and changing whole stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.store.format.label_table import LabelTable
    from flexcache.store.format.provenance import Provenance
    from flexcache.store.manage.copy import copy
    from flexcache.store.manage.merge import merge
    from flexcache.store.manage.remove import Removal
    from flexcache.store.manage.verify import Repair, Verification, repair, verify
    from flexcache.store.read.row_alignment import rows_in
    from flexcache.store.read.selection import select
    from flexcache.store.read.store import Store

__all__ = [
    "LabelTable",
    "Provenance",
    "Removal",
    "Repair",
    "Store",
    "Verification",
    "copy",
    "merge",
    "repair",
    "rows_in",
    "select",
    "verify",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "LabelTable": "flexcache.store.format.label_table:LabelTable",
        "Provenance": "flexcache.store.format.provenance:Provenance",
        "Removal": "flexcache.store.manage.remove:Removal",
        "Repair": "flexcache.store.manage.verify:Repair",
        "Store": "flexcache.store.read.store:Store",
        "Verification": "flexcache.store.manage.verify:Verification",
        "copy": "flexcache.store.manage.copy:copy",
        "merge": "flexcache.store.manage.merge:merge",
        "repair": "flexcache.store.manage.verify:repair",
        "rows_in": "flexcache.store.read.row_alignment:rows_in",
        "select": "flexcache.store.read.selection:select",
        "verify": "flexcache.store.manage.verify:verify",
    },
)
