"""The modules and parameters of a distributed model, found by the names that users write."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from flexcache.errors import SiteError, nearest
from flexcache.hooks.flexmodel.hook_groups import matches
from flexcache.hooks.locate.names import WRAPPERS, is_container, modules_by_path, runnable_paths


class ModuleIndex:
    """Modules by path: objects for the stages of this rank, paths alone for those of other ranks.

    Attributes
    ----------
    remote_paths : set of str
        Paths of modules that only other pipeline stages have.
    """

    def __init__(self, stages: Sequence[nn.Module]) -> None:
        self._modules: dict[str, list[nn.Module]] = {}
        for stage in stages:
            for path, module in modules_by_path(stage).items():
                self._modules.setdefault(path, []).append(module)
        self.remote_paths: set[str] = set()

    @property
    def local_paths(self) -> list[str]:
        """Paths of the modules of this rank, without the root."""
        return [path for path in self._modules if path]

    @property
    def hookable_paths(self) -> list[str]:
        """Paths of the modules that can be hooked, those of other pipeline stages included."""
        return [
            *runnable_paths({path: found[0] for path, found in self._modules.items()}),
            *sorted(self.remote_paths),
        ]

    def find_modules(self, name: str, asked: str | None = None) -> list[nn.Module]:
        """Return the modules of a name, one for each stage that has it; none if only another rank has it.

        Parameters
        ----------
        asked
            The name to show in errors.

        Raises
        ------
        SiteError
            No rank has such a module; the nearest name is given.
        """
        path = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        for candidate in (path, path.removeprefix("module."), "" if path == "module" else path):
            if candidate in self._modules:
                return self._modules[candidate]
            if candidate in self.remote_paths:
                return []
        raise SiteError(f"the model has no module {asked or name!r}", remedy=nearest(path, self.hookable_paths))

    def find_parameter(self, name: str) -> tuple[nn.Parameter | None, list[nn.Module]]:
        """Return a parameter and the modules that hold it; None if only another rank has it.

        Raises
        ------
        SiteError
            No rank has such a parameter; the nearest name is given.
        """
        path, _, weight = name.rpartition(".")
        holders = self.find_modules(path, name)
        parameter = holders[0]._parameters.get(weight) if holders else None
        if holders and parameter is None and name not in self.remote_paths:
            known = [key for key, value in holders[0]._parameters.items() if value is not None]
            raise SiteError(
                f"{path or 'the model'} has no parameter {weight!r}",
                remedy="FSDP1 keeps flat parameters; use fully_shard" if not known else nearest(weight, known),
            )
        return parameter, holders

    def match_names(self, pattern: str, parameters: bool) -> list[str]:
        """Return the names of the modules, or of the parameters, that a pattern of `matches` fits.

        Raises
        ------
        SiteError
            No name matches; the nearest names are given.
        """
        if parameters:
            named = [
                f"{path}.{weight}" if path else weight
                for path, found in self._modules.items()
                for weight, value in found[0]._parameters.items()
                if value is not None
            ]
        else:
            own = [path for path, found in self._modules.items() if path and not is_container(found[0])]
            named = [*own, *sorted(self.remote_paths)]
        if self.remote_paths:
            named = sorted(named)  # the same order on every stage
        chosen = [name for name in named if matches(pattern, name)]
        if not chosen:
            raise SiteError(f"no name matches {pattern!r}", remedy=nearest(pattern, named))
        return chosen
