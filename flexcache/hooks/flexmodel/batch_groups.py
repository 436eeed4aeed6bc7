"""Groups of hook functions, by which they are switched on and off."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flexcache.errors import HookError, nearest
from flexcache.hooks.flexmodel.hook_function import HookFunction
from flexcache.hooks.locate.search import glob_regex

ALL = "all"


class Groups:
    """Names for sets of hook functions. Every hook function is in the group ``all``; one may be in any number."""

    def __init__(self) -> None:
        self._members: dict[str, dict[HookFunction, None]] = {ALL: {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def update(self, functions: Iterable[HookFunction], group: str) -> None:
        """Add hook functions to a group, which is made if there is none of that name."""
        self._members.setdefault(group, {}).update(dict.fromkeys(functions))

    def remove(self, functions: Iterable[HookFunction], group: str) -> None:
        """Take hook functions out of a group, which is gone when the last one is.

        Raises
        ------
        HookError
            There is no such group, it is ``all``, or it lacks one of the functions.
        """
        members = self._group(group)
        if group == ALL:
            raise HookError("the group all holds every hook function", remedy="take them out of another group")
        functions = list(functions)
        lacking = [function.name for function in functions if function not in members]
        if lacking:
            raise HookError(f"group {group} has no {', '.join(lacking[:8])}", found=_listed(members))
        for function in functions:
            members.pop(function, None)
        if not members:
            del self._members[group]

    def of(self, function: HookFunction) -> set[str]:
        """Return the names of the groups that a hook function is in."""
        return {group for group, members in self._members.items() if function in members}

    def members(self, groups: str | Iterable[str]) -> list[HookFunction]:
        """Return the hook functions in any of *groups*, in the order of their registration.

        Raises
        ------
        HookError
            There is no such group; the nearest name is given.
        """
        names = [groups] if isinstance(groups, str) else list(groups)
        chosen: set[HookFunction] = set()
        for name in names:
            chosen.update(self._group(name))
        return [function for function in self._members[ALL] if function in chosen]

    def named(self, pattern: str) -> list[HookFunction]:
        """Return the registered hook functions whose module name a pattern matches.

        Raises
        ------
        HookError
            There is none.
        """
        found = [function for function in self._members[ALL] if matches(pattern, function.module_name)]
        if not found:
            raise HookError(f"no hook function's module matches {pattern!r}", found=_listed(self._members[ALL]))
        return found

    def _group(self, name: str) -> dict[HookFunction, None]:
        if name not in self._members:
            raise HookError(f"there is no group {name!r}", remedy=nearest(name, list(self._members)))
        return self._members[name]


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted name matches a pattern: a glob if it has ``*``, ``?`` or ``[``, else a part of the name.

    >>> matches("mlp", "layers.0.mlp.up_proj"), matches("layers.*.mlp", "layers.0.mlp.up_proj")
    (True, False)
    """
    import re

    return bool(re.fullmatch(glob_regex(pattern), name)) if re.search(r"[*?\[]", pattern) else pattern in name


def _listed(functions: Iterable[HookFunction]) -> str:
    names = [function.name for function in functions]
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "") if names else "none"
