"""Edits that use the activations of other documents: patch, interpolate, interchange, resample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.arguments import check_whole
from analysis.dataset import document_columns
from analysis.dataset.store_argument import accept_store_path
from analysis.replay.edits.directions import array_basis, random_basis
from analysis.replay.edits.edit import Edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.features import Numbers
from analysis.replay.edits.held_out import DirectionEdit, iterate_edits
from flexcache.hooks.flexmodel.edit_operations import project
from flexcache.store.read.store import Store

Donor = str | Mapping[str, str] | tuple[tuple[str, str], ...]
Align = str | Mapping[int, int] | tuple[tuple[int, int], ...]


@dataclass(frozen=True, eq=False, repr=False)
class DonorEdit(Edit):
    """An edit by the activations of another document, the *donor*, at the same site and layer of the store.

    Parameters
    ----------
    donor
        The id of one document for all, or a mapping from each document's id to its donor's id.
    align
        Which token of the donor a token gets: the token at the same position, counted from the ``"start"`` or from the
        ``"end"``, or pairs (position, donor's position). Documents without a donor, or whose donor has no such token,
        are left out of the results; so is a document whose donor is the document itself, unless pairs are given.
    """

    donor: Donor
    align: Align = "start"

    def __post_init__(self) -> None:
        if not isinstance(self.donor, str):
            pairs = self._list_pairs(self.donor, "donor as a document's id, or a mapping from id to id")
            self._set("donor", tuple((str(a), str(b)) for a, b in pairs))
        if isinstance(self.align, str):
            if self.align not in ("start", "end"):
                raise self.settings_error('align as "start", "end" or pairs of positions', repr(self.align))
        else:
            expected = 'align as "start", "end" or pairs of positions'
            pairs = self._list_pairs(self.align, expected)
            try:
                self._set("align", tuple((index(a), index(b)) for a, b in pairs))
            except TypeError:
                raise self.settings_error(expected, repr(self.align)[:80]) from None

    def _list_pairs(self, value: Any, expected: str) -> list[Any]:
        """Return the pairs of a mapping, or of a list of pairs."""
        pairs = value.items() if isinstance(value, Mapping) else value
        found = list(pairs) if isinstance(pairs, Iterable) else []
        if not found or any(not isinstance(pair, tuple | list) or len(pair) != 2 for pair in found):
            raise self.settings_error(expected, repr(value)[:80])
        return found

    def read_donors(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the activation of each token's donor, or *x* itself if it has none."""
        donors = donor_lines(self.donor, context.source.numbers, context.documents)
        if isinstance(self.align, str):
            positions = context.positions.copy()
            donors = np.where(donors == context.documents, -1, donors)  # its own token would be no change
            if self.align == "end":
                positions += context.document_lengths(donors) - context.document_lengths(context.documents)
        else:
            pairs = dict(self.align)
            positions = np.array([pairs.get(int(position), -1) for position in context.positions], np.int64)
        values, known = context.read_activations(donors, positions, x)
        return torch.where(known[:, None], values, x)


@dataclass(frozen=True, eq=False, repr=False)
class Patch(DonorEdit):
    """Replace by the donor's activation (activation patching; Zhang & Nanda 2023, arXiv 2309.16042).

    >>> Patch({"doc-1": "doc-2"}, align="end")
    Patch(donor=(('doc-1', 'doc-2'),), align='end')
    """

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the donors' activations."""
        return self.read_donors(x, context)


@dataclass(frozen=True, eq=False, repr=False)
class Interpolate(DonorEdit):
    """Move the share *t* of the distance to the donor's activation.

    >>> Interpolate("doc-2", t=[0.5, 1]).strengths
    (0.5, 1.0)
    """

    t: Numbers = 0.5
    strength_field: ClassVar[str] = "t"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers("t")

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the points between."""
        return x + self._one_strength(self.t) * (self.read_donors(x, context) - x)


@dataclass(frozen=True, eq=False, repr=False)
class Interchange(DonorEdit, DirectionEdit):
    """Replace the component in the span of *directions*, (features,) or (k, features), by the donor's component.

    Interchange of a subspace: Geiger et al. 2023, arXiv 2303.02536.

    >>> Interchange("doc-2", directions=[0.0, 1.0])
    Interchange(donor='doc-2', align='start', directions=array(2,))
    """

    directions: NDArray[Any] | tuple[()] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_array("directions", (1, 2))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return *x* with the donors' components along the directions."""
        basis = self._fit(array_basis(np.asarray(self.directions)), x)
        return x + project(self.read_donors(x, context) - x, basis)

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the edit with as many random directions."""
        return Interchange(self.donor, self.align, random_basis(np.asarray(self.directions), seed))


@dataclass(frozen=True, eq=False, repr=False)
class Resample(Edit):
    """Replace by the activation at the same position of a randomly drawn other document (resample ablation).

    Each document gets one other document that is at least as long; a document without one is left out.

    >>> Resample(seed=7)
    Resample(seed=7)
    """

    seed: int = 0

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return the activations of the drawn documents."""
        lengths, drawn = context.source.lengths, {}
        for document in np.unique(context.documents).tolist():
            others = np.flatnonzero(lengths >= lengths[document])
            others = others[others != document]
            rng = np.random.default_rng([self.seed, document])
            drawn[document] = int(rng.choice(others)) if len(others) else -1
        donors = np.array([drawn[document] for document in context.documents.tolist()], np.int64)
        values, known = context.read_activations(donors, context.positions, x)
        return torch.where(known[:, None], values, x)


def iterate_donor_edits(edit: Edit) -> Iterator[DonorEdit]:
    """Yield the edits with donors among an edit and those that it contains."""
    return (part for part in iterate_edits(edit) if isinstance(part, DonorEdit))


def donor_ids(donor: Donor) -> list[str]:
    """Return all ids in a setting of donors, those of documents and those of their donors."""
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


@accept_store_path
def same_length(store: Store, seed: int = 0, differing: str | None = None) -> dict[str, str]:
    """Return a randomly drawn donor of equal length for each document that has one: a mapping from id to id.

    ::

        donors = replay.same_length(store, differing="label")
        replay.Patch(donors)

    Parameters
    ----------
    differing
        A column of the documents in which the donor must differ, such as a label. Documents without a value there
        (null, NaN or an empty text) have no donor and are not donors.

    Raises
    ------
    AnalysisError
        *seed* is not a whole number; the documents have no such column, or it holds something other than text, numbers,
        booleans or dates.
    """
    given: Any = seed
    remedy = f"pass a column by keyword: differing={given!r}" if isinstance(given, str) else None
    check_whole("seed", given, 0, remedy=remedy)
    table, rng = store.documents, np.random.default_rng(seed)
    ids, lengths = table["id"].to_pylist(), table["n_tokens"].to_numpy()
    labels = np.arange(len(ids))
    if differing is not None:
        labels = document_columns.label_codes(
            document_columns.read_column(table, differing, "label", document_columns.LABEL_TYPES)
        )
    found = {}
    for line in np.flatnonzero(labels >= 0).tolist():
        others = np.flatnonzero((lengths == lengths[line]) & (labels >= 0) & (labels != labels[line]))
        if len(others):
            found[ids[line]] = ids[int(rng.choice(others))]
    return found
