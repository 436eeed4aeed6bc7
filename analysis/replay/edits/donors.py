"""Edits that bring in activations of other documents: patched, interpolated, interchanged, resampled."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.arguments import check_whole
from analysis.dataset import columns
from analysis.dataset.opens_store import opens_store
from analysis.replay.edits.edit import Chain, Edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.standard import ByLayer, NormMatched, Numbers, orthonormal, random_basis
from flexcache.store.read.store import Store

Donor = str | Mapping[str, str] | tuple[tuple[str, str], ...]
Align = str | Mapping[int, int] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, repr=False)
class Donated(Edit):
    """An edit by the activations of another document, the *donor*, at the same site and layer of the store.

    Parameters
    ----------
    donor
        One document's id for all, or which document's rows each gets: a mapping from id to id.
    align
        Which token of the donor a token gets: the one at the same position, counted from the ``"start"`` or the
        ``"end"``, or by pairs (position, donor's position). Documents that have no donor, or whose donor has no such
        token, are left out of the results.
    """

    donor: Donor
    align: Align = "start"

    def __post_init__(self) -> None:
        if not isinstance(self.donor, str):
            pairs = self._pairs(self.donor, "donor as a document's id, or a mapping from id to id")
            self._set("donor", tuple((str(a), str(b)) for a, b in pairs))
        if isinstance(self.align, str):
            if self.align not in ("start", "end"):
                raise self._unmeant('align as "start", "end" or pairs of positions', repr(self.align))
        else:
            expected = 'align as "start", "end" or pairs of positions'
            pairs = self._pairs(self.align, expected)
            try:
                self._set("align", tuple((index(a), index(b)) for a, b in pairs))
            except TypeError:
                raise self._unmeant(expected, repr(self.align)[:80]) from None

    def _pairs(self, value: Any, expected: str) -> list[Any]:
        """Return the pairs of a mapping, or of a list of pairs."""
        pairs = value.items() if isinstance(value, Mapping) else value
        found = list(pairs) if isinstance(pairs, Iterable) else []
        if not found or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in found):
            raise self._unmeant(expected, repr(value)[:80])
        return found

    def donors(self, spot: EditContext) -> NDArray[np.int64]:
        """Return the line of each token's donor in the store, −1 where there is none."""
        return donor_lines(self.donor, spot.source.numbers, spot.documents)

    def donated(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return the donors' activations, and *x* itself where there are none."""
        donors = self.donors(spot)
        if isinstance(self.align, str):
            positions = spot.positions.copy()
            if self.align == "end":
                positions += spot.lengths(donors) - spot.lengths(spot.documents)
        else:
            pairs = dict(self.align)
            positions = np.array([pairs.get(int(position), -1) for position in spot.positions], np.int64)
        values, known = spot.rows_of(donors, positions, x)
        return torch.where(known[:, None], values, x)


@dataclass(frozen=True, eq=False, repr=False)
class Patch(Donated):
    """Replace by the donor's activation (activation patching; Zhang & Nanda 2023, arXiv 2309.16042)."""

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return the donors' activations."""
        return self.donated(x, spot)


@dataclass(frozen=True, eq=False, repr=False)
class Interpolate(Donated):
    """Go the part *t* of the way to the donor's activation."""

    t: Numbers = 0.5
    strength_field: ClassVar[str] = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._numbers("t")

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return what is in between."""
        return x + self._one(self.t) * (self.donated(x, spot) - x)


@dataclass(frozen=True, eq=False, repr=False)
class Interchange(Donated):
    """Replace the part within the span of *directions*, (features,) or (k, features), by the donor's part.

    Interchange of a subspace: Geiger et al. 2023, arXiv 2303.02536.
    """

    directions: NDArray[Any] | tuple[()] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._array("directions", (1, 2))

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return *x* with the donors' part along the directions."""
        basis = self._fit(orthonormal(np.asarray(self.directions)), x)
        return x + ((self.donated(x, spot) - x) @ basis.T) @ basis

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the same with as many random directions."""
        return Interchange(self.donor, self.align, random_basis(np.asarray(self.directions), seed))


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Edit):
    """Replace by the activation at the same position of another document, drawn at random (resample ablation).

    Each document gets one other document, of those that are at least as long; where there is none, it is left out.
    """

    seed: int = 0

    def change(self, x: torch.Tensor, spot: EditContext) -> torch.Tensor:
        """Return what was drawn."""
        lengths, drawn = spot.source.lengths, {}
        for document in np.unique(spot.documents).tolist():
            others = np.flatnonzero(lengths >= lengths[document])
            others = others[others != document]
            rng = np.random.default_rng([self.seed, document])
            drawn[document] = int(rng.choice(others)) if len(others) else -1
        donors = np.array([drawn[document] for document in spot.documents.tolist()], np.int64)
        values, known = spot.rows_of(donors, spot.positions, x)
        return torch.where(known[:, None], values, x)


def donated(edit: Edit) -> Iterator[Donated]:
    """Yield an edit, or the edits that it is made of, where they have donors."""
    if isinstance(edit, Donated):
        yield edit
    parts: tuple[Edit, ...] = ()
    if isinstance(edit, Chain):
        parts = edit.edits
    elif isinstance(edit, ByLayer):
        parts = tuple(part for _, part in edit.edits)
    elif isinstance(edit, NormMatched):
        parts = (edit.edit,)
    for part in parts:
        yield from donated(part)


def donor_ids(donor: Donor) -> list[str]:
    """Return the ids that a donor names, both of documents and of their donors."""
    if isinstance(donor, str):
        return [donor]
    return [str(name) for pair in (donor.items() if isinstance(donor, Mapping) else donor) for name in pair]


def donor_lines(donor: Donor, numbers: Mapping[str, int], documents: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the line of each document's donor in the store, −1 where there is none."""
    if isinstance(donor, str):
        return np.full(len(documents), numbers.get(donor, -1), np.int64)
    given = donor.items() if isinstance(donor, Mapping) else donor
    pairs = {numbers.get(a, -1): numbers.get(b, -1) for a, b in given}
    return np.array([pairs.get(int(document), -1) for document in documents], np.int64)


@opens_store
def same_length(store: Store, seed: int = 0, differing: str | None = None) -> dict[str, str]:
    """Return a donor of equal length for each document that has one, drawn at random, by id.

    Parameters
    ----------
    differing
        A column of the documents in which the donor must differ, such as a label. Documents without a value there
        (null, NaN or an empty text) have no donor and are none.

    Raises
    ------
    AnalysisError
        *seed* is no whole number; the documents have no such column, or it holds no text, numbers, booleans or dates.
    """
    given: Any = seed
    remedy = f"name the argument of a column: differing={given!r}" if isinstance(given, str) else None
    check_whole("seed", given, 0, remedy=remedy)
    table, rng = store.documents, np.random.default_rng(seed)
    ids, lengths = table["id"].to_pylist(), table["n_tokens"].to_numpy()
    labels = np.arange(len(ids))
    if differing is not None:
        labels = columns.label_codes(columns.column(table, differing, "label", columns.LABELS))
    found = {}
    for line in np.flatnonzero(labels >= 0).tolist():
        others = np.flatnonzero((lengths == lengths[line]) & (labels >= 0) & (labels != labels[line]))
        if len(others):
            found[ids[line]] = ids[int(rng.choice(others))]
    return found
