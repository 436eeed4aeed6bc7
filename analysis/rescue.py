"""Write results, and save them in a temporary folder if the target cannot be written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flexcache.errors import OutputError

R = TypeVar("R")


def write_or_rescue(write: Callable[[Path], R], folder: Path) -> R:
    """Return ``write(folder)``; if the folder cannot be written, write to a temporary folder and raise OutputError.

    Raises
    ------
    OutputError
        *folder* cannot be written; the error names the temporary folder that holds the results.

    >>> write_or_rescue(lambda folder: folder.name, Path("results"))
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
            temporary = Path(tempfile.mkdtemp(prefix="flexcache-results-"))
            write(temporary)
            failure.remedy = f"they are in {temporary}: copy them from there"
        except OSError:  # no folder can be written
            pass
        raise failure from error
