"""Every error a user can meet, in one small tree.

    FlexCacheError
    ├── ConfigError          a configuration without a valid meaning: unknown key, bad value
    ├── DocumentsError       a corpus that cannot be read, or an empty document
    ├── SiteError            a site or layer that the model does not have
    ├── PlanError            a plan that cannot be carried out: no room on the disk, nothing to keep
    ├── HookError            a hook that did not fire, or an activation that cannot be read or edited
    │   └── LayoutError      an activation that cannot be assembled from the pieces on the processes
    ├── CaptureError         a forward that did not deliver what the plan needs
    │   └── RangeError       a value that the storage dtype cannot hold, or that is not finite
    ├── StoreError           a folder that is not what it should be
    │   ├── VersionError     a store written by a newer version
    │   ├── MismatchError    a store that was made from something else
    │   ├── UncommittedError rows that have not been captured yet
    │   ├── DamagedError     bytes that are missing or changed
    │   └── UnreachableError object storage that does not answer, or denies access
    ├── OutputError          results that cannot be written to their destination
    └── AnalysisError        a question that the data cannot answer

Each error states where it happened, the expected and the found value, and a remedy.
"""

from __future__ import annotations


class FlexCacheError(Exception):
    """Base of all errors; ``str()`` gives the message, and each known part on a separate line.

    >>> print(FlexCacheError("no such layer", expected="0 to 11", found="12"))
    no such layer
      expected: 0 to 11
      found: 12
    """

    def __init__(
        self,
        message: str,
        *,
        where: str | None = None,
        expected: str | None = None,
        found: str | None = None,
        remedy: str | None = None,
    ) -> None:
        self.message = message
        self.where = where
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(message)

    def __str__(self) -> str:
        parts = {
            "where": self.where,
            "expected": self.expected,
            "found": self.found,
            "what to do": self.remedy,
        }
        return "\n".join([self.message, *(f"  {name}: {text}" for name, text in parts.items() if text)])

    def __reduce__(self) -> tuple:
        return _rebuild, (type(self), self.args), dict(vars(self))


def _rebuild(cls: type[FlexCacheError], arguments: tuple[object, ...]) -> FlexCacheError:
    """Return an error without calling its constructor; pickle then sets its attributes."""
    return cls.__new__(cls, *arguments)


class ConfigError(FlexCacheError):
    """A configuration that has no valid meaning."""


class DocumentsError(FlexCacheError):
    """A corpus that cannot be read, or a document that cannot be used."""


class SiteError(FlexCacheError):
    """A site or layer that the model does not have."""


class HookError(FlexCacheError):
    """A hook that did not fire, or an activation that cannot be read or edited."""


class LayoutError(HookError):
    """An activation that cannot be assembled from the pieces on the processes."""


class PlanError(FlexCacheError):
    """A plan that cannot be carried out."""


class CaptureError(FlexCacheError):
    """A forward that did not deliver what the plan needs."""


class RangeError(CaptureError):
    """A value that is not finite, or that the storage dtype cannot hold."""


class StoreError(FlexCacheError):
    """A folder that is not the store it should be."""


class VersionError(StoreError):
    """A store written by a newer version of the format."""


class MismatchError(StoreError):
    """A store that was made from another model, corpus or configuration."""


class UncommittedError(StoreError):
    """Rows that have not been captured yet."""


class DamagedError(StoreError):
    """Bytes of a store that are missing or changed."""


class UnreachableError(StoreError):
    """Object storage that does not answer, or denies access."""


class OutputError(FlexCacheError):
    """Results that cannot be written to their destination; the remedy says where they are instead."""


class AnalysisError(FlexCacheError):
    """A question that the data cannot answer."""


def nearest(name: str, names: list[str] | tuple[str, ...]) -> str:
    """Return part of a sentence that lists *names*, the one closest to *name* first.

    >>> nearest("resid_pots", ["mlp_out", "resid_post"])
    'did you mean resid_post? There are: mlp_out, resid_post'
    """
    import difflib

    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.6)
    listed = ", ".join(names[:40]) + (f", … ({len(names)} in all)" if len(names) > 40 else "")
    return f"did you mean {close[0]}? There are: {listed}" if close else f"there are: {listed}"
