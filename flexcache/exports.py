"""Public names of a package, imported when they are first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the ``__getattr__`` and ``__dir__`` of a package, so that importing it imports none of its modules.

    Parameters
    ----------
    package
        The ``__name__`` of the package.
    modules
        For each public name the module that has it, as ``"module"`` for a module itself or ``"module:attribute"``.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 - it becomes the package's
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = modules[name].partition(":")
        found = import_module(module)
        return getattr(found, attribute) if attribute else found

    return __getattr__, lambda: sorted(modules)
