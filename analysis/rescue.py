"""Results that outlive a failed write: they go to a temporary folder, and the error says where."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flexcache.errors import OutputError

R = TypeVar("R")


def rescued(write: Callable[[Path], R], folder: Path) -> R:
    """Return what *write* returns for a folder; where the disk refuses, write to a temporary folder and raise.

    Raises
    ------
    OutputError
        Naming the folder in which the results are now.

    >>> rescued(lambda folder: folder.name, Path("results"))
    'results'
    """
    try:
        return write(folder)
    except OSError as error:
        failure = OutputError(
            "the results cannot be written",
            where=str(folder),
            found=error.strerror or str(error),
            remedy="make room or choose another folder, and run it again",
        )
        try:
            place = Path(tempfile.mkdtemp(prefix="flexcache-results-"))
            write(place)
            failure.remedy = f"they are in {place}: copy them from there"
        except OSError:  # nothing can be written anywhere
            pass
        raise failure from error
