"""Groups of hook functions, which are activated together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from flexcache.errors import HookError, nearest
from flexcache.hooks.flexmodel.hook_function import HookFunction
from flexcache.hooks.locate.names import glob_regex

ALL = "all"


class HookGroups:
    """Named groups of hook functions. All functions are in the group ``all``; each may be in any number of others."""

    def __init__(self) -> None:
        self._members: dict[str, dict[HookFunction, None]] = {ALL: {}}

    def __iter__(self) -> Iterator[str]:
        return iter(self._members)

    def add_functions(self, functions: Iterable[HookFunction], group: str) -> None:
        """Add hook functions to a group; a missing group is created."""
        self._members.setdefault(group, {}).update(dict.fromkeys(functions))

    def remove_functions(self, functions: Iterable[HookFunction], group: str) -> None:
        """Remove hook functions from a group; an empty group is deleted.

        Raises
        ------
        HookError
            There is no such group, it is ``all``, or it does not have one of the functions.
        """
        members = self._group(group)
        if group == ALL:
            raise HookError("the group all holds every hook function", remedy="remove them from another group")
        functions = list(functions)
        lacking = [function.name for function in functions if function not in members]
        if lacking:
            raise HookError(f"group {group} does not have {', '.join(lacking[:8])}", found=_listed(members))
        for function in functions:
            members.pop(function, None)
        if not members:
            del self._members[group]

    def groups_of(self, function: HookFunction) -> set[str]:
        """Return the names of the groups of a hook function."""
        return {group for group, members in self._members.items() if function in members}

    def functions_in(self, groups: str | Iterable[str]) -> list[HookFunction]:
        """Return the hook functions in any of *groups*, in the order of registration.

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

    def match_functions(self, pattern: str) -> list[HookFunction]:
        """Return the registered hook functions whose module name matches a pattern.

        Raises
        ------
        HookError
            No name matches.
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
    """Return True if a dotted name matches a pattern: a glob with ``*``, ``?`` or ``[``, or a part of the name.

    >>> matches("mlp", "layers.0.mlp.up_proj"), matches("layers.*.mlp", "layers.0.mlp.up_proj")
    (True, False)
    """
    import re

    return bool(re.fullmatch(glob_regex(pattern), name)) if re.search(r"[*?\[]", pattern) else pattern in name


def _listed(functions: Iterable[HookFunction]) -> str:
    names = [function.name for function in functions]
    return ", ".join(names[:8]) + (f", … ({len(names)})" if len(names) > 8 else "") if names else "none"
