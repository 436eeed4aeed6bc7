"""How a sweep is run: side by side, where, and what is shown meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flexcache.errors import AnalysisError


@dataclass(frozen=True, kw_only=True)
class Execution:
    """How a sweep is run.

    Parameters
    ----------
    copies
        Number of cells that go side by side through one forward, each from its own layer on; documents of a batch that
        are not in the sweep are then left out. More than 1 is much faster for few or short documents, but no longer
        exact bit for bit: the error is measured at each layer, as for a narrower storage dtype.
    folder
        Folder that keeps the results of each batch; the same sweep with the same folder resumes from them.
    scheduler
        ``"processes"``: *workers* Dask processes that load the model once each; ``"tcp://…"``: a Dask cluster. By
        default everything runs in this process.
    progress
        Show a progress bar.

    Raises
    ------
    AnalysisError
        *copies* is less than 1.
    """

    copies: int = 1
    folder: str | Path | None = None
    scheduler: str | None = None
    workers: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise AnalysisError("copies is too small", expected="at least 1", found=str(self.copies))
