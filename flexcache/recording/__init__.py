"""Capture: documents to a plan, forwards over its batches, and rows into a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexcache.exports import lazy_exports

if TYPE_CHECKING:
    from flexcache.recording.forward.batch import Batch
    from flexcache.recording.forward.objective import LogitDifference, NextTokenLoss, Objective
    from flexcache.recording.forward.transform import Transform
    from flexcache.recording.run.recorder import Recorder

__all__ = [
    "Batch",
    "LogitDifference",
    "NextTokenLoss",
    "Objective",
    "Recorder",
    "Transform",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Batch": "flexcache.recording.forward.batch:Batch",
        "LogitDifference": "flexcache.recording.forward.objective:LogitDifference",
        "NextTokenLoss": "flexcache.recording.forward.objective:NextTokenLoss",
        "Objective": "flexcache.recording.forward.objective:Objective",
        "Recorder": "flexcache.recording.run.recorder:Recorder",
        "Transform": "flexcache.recording.forward.transform:Transform",
    },
)
