"""Options of how a replay sweep is executed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flexcache.errors import AnalysisError
from flexcache.keywords import check_keywords


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Copies, folder, workers and progress of a replay sweep; each field is also a keyword of `sweep`.

    >>> ExecutionOptions(copies=100).workers
    2

    Attributes
    ----------
    copies : int
        Number of cells that go side by side through one forward, each from its own layer on; documents of a batch that
        are not in the sweep are then left out. More than 1 is much faster for few or short documents, but no longer
        exact bit for bit: the error is measured at each layer, as for a narrower storage dtype.
    folder : str or Path, or None
        Folder that keeps the results of each batch; the same sweep with the same folder resumes from them.
    scheduler : str, or None
        ``"processes"``: *workers* Dask processes that load the model once each; ``"tcp://…"``: a Dask cluster. By
        default everything runs in this process.
    workers : int
        Number of processes.
    progress : bool
        Show a progress bar if standard error is a terminal.
    """

    copies: int = 1
    folder: str | Path | None = None
    scheduler: str | None = None
    workers: int = 2
    progress: bool = True

    def __post_init__(self) -> None:
        if self.copies < 1:
            raise AnalysisError("copies is too small", expected="at least 1", found=str(self.copies))

    @classmethod
    def merge(
        cls, options: ExecutionOptions | None, named: Mapping[str, Any], function: Callable[..., Any]
    ) -> ExecutionOptions:
        """Return *options*, or the defaults, with the keywords *named* of *function* in their place.

        Raises
        ------
        AnalysisError
            A keyword is not an option, or a value cannot be used.
        """
        check_keywords(function, named, (field.name for field in fields(cls)), AnalysisError)
        return replace(options or cls(), **named)
