"""Repeat requests to object storage that fail for a while, and raise one clear error if they go on failing."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

from flexcache.errors import FlexCacheError, UnreachableError

ATTEMPTS = 6
FIRST_WAIT = 0.2
LONGEST_WAIT = 10.0
Result = TypeVar("Result")
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, FlexCacheError)
"""Exceptions that are answers, not failures."""
_FINAL = (
    "PermissionError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ParamValidationError",
    "ProfileNotFound",
    "UnauthenticatedError",
    "InvalidPathError",
)
"""Failures that the same request meets again."""
_STATUS = re.compile(r"status code: (\d{3})")


def attempt(url: str, request: Callable[[], Result]) -> Result:
    """Return what *request* returns; repeat it after a failure that may pass, six attempts in all.

    The waits double from 0.2 s, with a random part, so that many processes do not come back at once. UnreachableError
    if it goes on failing, or access is denied; FileNotFoundError and its like are the storage's answers.
    """
    for number in range(ATTEMPTS):
        try:
            return request()
        except Exception as raised:  # every client has exceptions of its own
            error = translated(raised)
            if isinstance(error, _ANSWERS):
                raise error from None
            names = {kind.__name__ for kind in type(error).__mro__}
            if names.intersection(_FINAL) or number == ATTEMPTS - 1:
                raise unreachable(url, error) from raised
        time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2**number) * random.uniform(0.5, 1.0))
    raise AssertionError


def translated(error: Exception) -> Exception:
    """Return the built-in exception for an error of obstore or boto3 with the same meaning; others unchanged."""
    response: Any = getattr(error, "response", None)  # of boto3
    found = _STATUS.search(str(error))
    status = (
        response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(response, dict) else found and int(found[1])
    )
    if type(error).__name__ == "AlreadyExistsError":
        return FileExistsError(17, "the object exists", str(error).partition("\n")[0])
    if status == 404 or (isinstance(error, ValueError) and "parse path" in str(error)):  # as "a//b", which none has
        return FileNotFoundError(2, "no such object", str(error).partition("\n")[0])
    if status in (401, 403):
        return PermissionError(13, str(error).partition("\n")[0])
    return error


def unreachable(url: str, error: BaseException) -> UnreachableError:
    """Return the error that a user sees for one of a client's."""
    denied = isinstance(error, PermissionError) or "Credentials" in type(error).__name__
    told = " ".join(str(error).partition("Debug source:")[0].split())[:300]
    return UnreachableError(
        "object storage " + ("denies access" if denied else "does not answer as it should"),
        where=url,
        found=f"{type(error).__name__}: {told}",
        remedy=("give credentials, as docs/remote.md says" if denied else "check the connection")
        + ", then run the same command again: committed units are kept, and it continues after them",
    )
