"""Doing a request again when it failed for a while, and saying so once when it goes on failing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from flexcache.errors import UnreachableError

ATTEMPTS = 6
FIRST_WAIT = 0.2
LONGEST_WAIT = 10.0

Result = TypeVar("Result")

_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
"""What a storage answers; that is no failure."""

_FINAL = ("PermissionError", "NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "ProfileNotFound")
"""Failures that the same request meets again."""


def attempt(url: str, request: Callable[[], Result]) -> Result:
    """Return what *request* returns; a failure that may pass is tried again, six times in all.

    The waits double from 0.2 s, with a random part, so that many processes do not come back at once.

    Raises
    ------
    UnreachableError
        It goes on failing, or access is denied.
    FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError
        What the storage answers.
    """
    for number in range(ATTEMPTS):
        try:
            return request()
        except _ANSWERS:
            raise
        except Exception as error:  # every driver has kinds of its own
            names = {kind.__name__ for kind in type(error).__mro__}
            if names.intersection(_FINAL) or number == ATTEMPTS - 1:
                raise unreachable(url, error) from error
        time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**number) * random.uniform(0.5, 1.0))
    raise AssertionError


def unreachable(url: str, error: BaseException) -> UnreachableError:
    """Return the error that a user sees for one of a driver's."""
    denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    return UnreachableError(
        "object storage " + ("denies access" if denied else "does not answer as it should"),
        where=url,
        found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        remedy=("give credentials, as docs/remote.md says" if denied else "look after the connection")
        + ", then run the same command again: what is committed is kept, and it goes on after that",
    )
