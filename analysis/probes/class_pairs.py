"""Pair the classes of a target with the classes of a probe that was fitted to another target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.dataset.probe_dataset import ProbeDataset
from flexcache.errors import AnalysisError


def pair_classes(dataset: ProbeDataset, known: Sequence[Any], given: Mapping[Any, Any] | None) -> dict[str, str]:
    """Return the class of the probe, one of *known*, for each class of a target that has one; names are text.

    Classes that *given* does not name are paired by equal names. A regression has no classes and no pairs.

    Raises
    ------
    AnalysisError
        *given* fits neither from target to probe nor the other way round; fewer than two classes of the probe have a
        pair.
    """
    own, probed = _names(dataset.classes), _names(known)
    if not isinstance(given, Mapping | None):
        raise AnalysisError(
            "classes is not a mapping",
            expected="the class of the probe for each class of the target, such as {'fresh': 'positive'}",
            found=repr(given)[:80],
        )
    told = f"{', '.join(own) or 'none'} in the target {dataset.target!r}; {', '.join(probed) or 'none'} in the probe"
    fitting = [pairs for pairs in _both_ways(given or {}) if {*pairs} <= {*own} and {*pairs.values()} <= {*probed}]
    if not fitting:
        raise AnalysisError("classes names what is not a class", expected=told, found=str(given))
    pairs = {name: name for name in own if name in probed} | fitting[0]
    if own and len(set(pairs.values())) < 2:
        found = "no class" if not pairs else f"only the class {next(iter(pairs.values()))!r}"
        raise AnalysisError(
            f"the labels have {found} in common",
            expected="at least two classes of the probe, by equal names or as classes pairs them",
            found=told,
            remedy=f"give the class of the probe for each class of the target: classes={{{own[0]!r}: …}};"
            f" on the command line, --classes {own[0]}=…",
        )
    return pairs


def usable_pairs(dataset: ProbeDataset, known: Sequence[Any], given: Mapping[Any, Any]) -> dict[str, str]:
    """Return the pairs of *given* of which one name is a class of the target and the other one of *known*."""
    own, probed = _names(dataset.classes), _names(known)
    return {a: b for pairs in _both_ways(given) for a, b in pairs.items() if a in own and b in probed}


def paired_targets(
    dataset: ProbeDataset, known: Sequence[Any], pairs: Mapping[str, str]
) -> tuple[NDArray[Any], NDArray[np.bool_], dict[str, int]]:
    """Return the targets of the paired samples as codes of *known*, their mask, and the number of others by class."""
    if dataset.task == "regression":
        return dataset.y, np.ones(dataset.n_samples, bool), {}
    own, probed = _names(dataset.classes), _names(known)
    codes = np.array([probed.index(pairs[name]) if name in pairs else -1 for name in own])
    y, sizes = codes[dataset.y], np.bincount(dataset.y, minlength=len(codes)).tolist()
    return y[y >= 0], y >= 0, {name: size for name, size in zip(own, sizes, strict=True) if name not in pairs}


def _names(classes: Sequence[Any]) -> list[str]:
    return [str(name) for name in classes]


def _both_ways(given: Mapping[Any, Any]) -> list[dict[str, str]]:
    """Return the pairs as given, and swapped if no name would be lost."""
    pairs = {str(one): str(other) for one, other in given.items()}
    swapped = {other: one for one, other in pairs.items()}
    return [pairs, swapped] if len(swapped) == len(pairs) else [pairs]
