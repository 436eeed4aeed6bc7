"""Edits that are fitted to some documents of a store, and judged on the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray

from analysis.arguments import check_whole
from analysis.dataset import document_columns
from analysis.dataset.probe_dataset import build_dataset
from analysis.dataset.readable import Rows, Task
from analysis.dataset.store_argument import accept_store_path
from analysis.replay.edits.by_layer import ByLayer
from analysis.replay.edits.edit import Chain, Edit, check_edit
from analysis.replay.edits.edit_context import EditContext
from analysis.replay.edits.heads import OnHeads
from analysis.replay.edits.noise import NormMatched
from flexcache.errors import AnalysisError, nearest
from flexcache.keywords import check_keywords
from flexcache.site import Layers
from flexcache.store.read.store import Store


@dataclass(frozen=True, eq=False, repr=False)
class Fitted(Edit):
    """An edit that was fitted to documents of a store; a sweep judges it on the other documents.

    `Steer.fit_store`, `ProjectOut.fit_store`, `Interchange.fit_store` and `Erase.fit_store` return it. ::

        edit = replay.Steer.fit_store(store, "label", "resid_post", [8, 12], alpha=[-4, 4])
        replay.sweep(store, model, replay.grid(layers=[8, 12]), edit)

    Parameters
    ----------
    edit
        What was fitted: an edit, or one for each layer.
    target
        Name of the column.
    documents
        Ids of the documents of the fit, and of those without a target that were drawn with them.
    held_out, groups, seed
        As for `fit_store`. With *held_out* 0, a sweep judges on the documents of the fit too, and its notes say so.
    """

    edit: Edit
    target: str
    documents: tuple[str, ...]
    held_out: float = 0.5
    groups: str = "document"
    seed: int = 0

    def __post_init__(self) -> None:
        check_edit(self.edit)
        self._set("documents", tuple(map(str, self.documents)))

    def change(self, x: torch.Tensor, context: EditContext) -> torch.Tensor:
        """Return what the fitted edit returns."""
        return self.edit.change(x, context)

    def with_random_directions(self, seed: int, features: int) -> Edit | None:
        """Return the fitted edit with random directions."""
        return self.edit.with_random_directions(seed, features)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the fitted edit."""
        return self.edit.strengths

    def at_strength(self, strength: float) -> Edit:
        """Return the fitted edit at one strength."""
        return Fitted(
            self.edit.at_strength(strength), self.target, self.documents, self.held_out, self.groups, self.seed
        )

    @property
    def name(self) -> str:
        """The name of the fitted edit."""
        return self.edit.name


class FittedEdit(Edit):
    """An edit with `fit`, which fits it to activations and a concept, and `fit_store`, which does so held out."""

    fitted_fields: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that `fit` computes."""
    fit_settings: ClassVar[tuple[str, ...]] = ()
    """Names of the further settings of `fit`."""
    fit_task: ClassVar[Task | None] = None
    """The task of a target, if that is not told."""

    @classmethod
    def fit(cls, X: NDArray[Any], y: NDArray[Any], **settings: Any) -> Edit:
        """Return the edit of activations (samples, features) and of classes or values (samples,)."""
        raise NotImplementedError

    @classmethod
    def fit_store(
        cls,
        store: Store,
        target: str,
        site: str = "resid_post",
        layers: Layers = "all",
        rows: Rows | None = "last",
        task: Task | None = None,
        *,
        held_out: float = 0.5,
        groups: str = "document",
        seed: int = 0,
        **settings: Any,
    ) -> Fitted:
        """Fit to a label column of some documents of a store, layer by layer; a sweep judges on the other documents.

        The documents are divided by *groups*, *held_out* and *seed* alone, so that edits of different targets have the
        same documents held out.

        Parameters
        ----------
        target, site, layers, rows, task
            As for `analysis.dataset.probe_dataset.build_dataset`; a direction takes values as classes. Documents
            without a target are left out of the fit.
        held_out
            Share of the groups that is not used in the fit. With 0, the fit uses all documents, and a sweep judges on
            the same documents: too good a result, which its notes say.
        groups
            ``"document"``, or a column of the documents: documents of equal value are not divided. A document without a
            value is its own group.
        seed
            Seed of the division.
        settings
            Of `fit`, and of the edit, such as alpha.

        Raises
        ------
        AnalysisError
            There is no such column, site or layer; *held_out* is not at least 0 and below 1; a part has no group; the
            documents of the fit lack a class.
        """
        return _fit_store(cls, store, target, site, layers, rows, task, held_out, groups, seed, settings)


@accept_store_path
def _fit_store(
    kind: type[FittedEdit],
    store: Store,
    target: str,
    site: str,
    layers: Layers,
    rows: Rows | None,
    task: Task | None,
    held_out: float,
    groups: str,
    seed: int,
    settings: dict[str, Any],
) -> Fitted:
    free = [field.name for field in fields(kind) if field.name not in kind.fitted_fields]
    check_keywords(kind.fit_store, settings, (*free, *kind.fit_settings), AnalysisError)
    chosen = choose_fitted(store, held_out, groups, seed)
    dataset = build_dataset(store, site, target, rows=rows, layers=layers, task=task or kind.fit_task)
    if issubclass(kind, DirectionEdit) and len(dataset.classes) != 2:
        raise AnalysisError(
            f"a direction needs two classes of {target!r}",
            expected="two",
            found=f"{len(dataset.classes)}: {', '.join(map(str, dataset.classes[:6]))}",
        )
    inside = chosen[dataset.source[dataset.document]]
    y = dataset.y[inside]
    present = np.unique(y)
    if len(present) < max(2, len(dataset.classes)):
        lacking = [value for code, value in enumerate(dataset.classes) if code not in present]
        raise AnalysisError(
            f"the documents of the fit do not have all classes of {target!r}",
            where=f"{int(chosen.sum())} of {len(chosen)} documents, groups {groups!r}, seed {seed}",
            expected="at least one document of each class" if dataset.classes else "values that differ",
            found=f"none of {lacking[0]!r}" if lacking else "one value only",
            remedy="hold out fewer documents, or divide them with another seed",
        )
    fits = {layer: kind.fit(dataset.read_layer(layer)[inside], y, **settings) for layer in dataset.layers}
    edit = next(iter(fits.values())) if len(fits) == 1 else ByLayer(fits)
    ids = np.array(store.documents["id"].to_pylist(), object)[chosen].tolist()
    return Fitted(edit, target, ids, float(held_out), groups, seed)


def choose_fitted(store: Store, held_out: float, groups: str, seed: int) -> NDArray[np.bool_]:
    """Return True for each document of the store that belongs to the fit, shape (documents,); see `fit_store`.

    Raises
    ------
    AnalysisError
        *held_out* or *seed* is not such a number; there is no such column; a part has no group.
    """
    check_whole("seed", seed, 0)
    if isinstance(held_out, bool) or not isinstance(held_out, int | float) or not 0 <= held_out < 1:
        raise AnalysisError("held_out cannot be used", expected="at least 0 and below 1", found=repr(held_out)[:80])
    group = document_groups(store, groups)
    count = int(group.max(initial=-1)) + 1
    kept = round(count * (1 - held_out))
    if not 0 < kept < count + (held_out == 0):
        raise AnalysisError(
            "documents cannot be divided into a part for the fit and one that is held out",
            where=f"groups {groups!r}",
            expected="at least one group in each",
            found=f"{count} groups, held_out={held_out:g}",
            remedy="hold out another share, or group by another column",
        )
    order = np.random.default_rng(seed).permutation(count)
    found: NDArray[np.bool_] = np.isin(group, order[:kept])
    return found


def document_groups(store: Any, groups: str) -> NDArray[np.int64]:
    """Return the number of each document's group, from 0 without gaps, shape (documents,).

    *groups* is ``"document"`` or a column; a document without a value there is its own group.

    Raises
    ------
    AnalysisError
        There is no such column.
    """
    table = store.documents
    if groups == "document":
        return np.arange(len(table))
    if groups not in table.column_names:
        raise AnalysisError(
            f"documents cannot be grouped by {groups!r}",
            expected="a column of the store's documents",
            remedy=nearest(groups, tuple(table.column_names)),
        )
    column = document_columns.read_column(table, groups, "groups", document_columns.LABEL_TYPES)
    codes = document_columns.label_codes(column)
    return np.unique(np.where(codes < 0, len(codes) + np.arange(len(codes)), codes), return_inverse=True)[1]


def iterate_edits(edit: Edit) -> Iterator[Edit]:
    """Yield an edit and all edits that it contains."""
    yield edit
    parts: tuple[Edit, ...] = ()
    if isinstance(edit, Chain):
        parts = edit.edits
    elif isinstance(edit, ByLayer):
        parts = tuple(part for _, part in edit.edits)
    elif isinstance(edit, NormMatched | OnHeads | Fitted):
        parts = (edit.edit,)
    for part in parts:
        yield from iterate_edits(part)


def iterate_fitted(edits: Iterable[Edit]) -> Iterator[Fitted]:
    """Yield the fitted edits among edits and those that they contain."""
    return (part for edit in edits for part in iterate_edits(edit) if isinstance(part, Fitted))


def judged_documents(edits: Iterable[Edit], documents: Iterable[str]) -> list[str]:
    """Return the ids among *documents* on which edits are judged: those that no edit was fitted to."""
    used = {name for part in iterate_fitted(edits) if part.held_out for name in part.documents}
    return [name for name in documents if name not in used]


def describe_split(part: Fitted, judged: int) -> str:
    """Return a sentence about the documents that an edit was fitted to and the number of those it is judged on."""
    fit = f"{part.name}, by {part.target!r}, was fitted to {len(part.documents)} documents"
    if not part.held_out:
        return f"{fit} that include those it is judged on, so its effect is too large: hold out a part."
    by = "documents" if part.groups == "document" else f"whole groups of {part.groups!r}"
    return f"{fit} and judged on {judged} others (divided by {by}, seed {part.seed})."


class DirectionEdit(FittedEdit):
    """An edit along directions, whose fit is the difference of the means of two classes."""

    fitted_fields: ClassVar[tuple[str, ...]] = ("directions",)
    fit_settings: ClassVar[tuple[str, ...]] = ("unit",)
    fit_task: ClassVar[Task | None] = "classification"

    @classmethod
    def fit(cls, X: NDArray[Any], y: NDArray[Any], *, unit: bool = False, **settings: Any) -> Self:
        """Fit the mean of the second of two classes less that of the first, in sorted order.

        Parameters
        ----------
        X, y
            Activations (samples, features), and their classes (samples,).
        unit
            Scale the direction to length 1.
        settings
            The other fields of the edit, such as alpha.

        Raises
        ------
        AnalysisError
            Shapes do not fit, or there are not two classes.
        """
        X, y = np.asarray(X, np.float64), np.asarray(y)
        classes = np.unique(y)
        if X.ndim != 2 or len(X) != len(y):
            raise AnalysisError("activations and classes do not fit", found=f"shapes {X.shape} and {y.shape}")
        if len(classes) != 2 or y.dtype.kind == "f":
            found = "numbers" if y.dtype.kind == "f" else f"{len(classes)}: {classes[:8].tolist()}"
            raise AnalysisError("a direction needs two classes", expected="two", found=found)
        vector = X[y == classes[1]].mean(0) - X[y == classes[0]].mean(0)
        length = float(np.linalg.norm(vector))
        if unit and not length:
            raise AnalysisError("a direction of length 1 cannot be made", found="two classes of equal means")
        return cls(**{cls.fitted_fields[0]: vector / length if unit else vector, **settings})
