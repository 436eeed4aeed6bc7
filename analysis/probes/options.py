"""Options of a probe sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from analysis.arguments import check_whole
from analysis.dataset.readable import Rows, Task
from analysis.probes.evaluation.metric_values import Metric
from flexcache.errors import AnalysisError, nearest
from flexcache.keywords import check_keywords
from flexcache.site import Layers
from flexcache.spec import listed

Selection = Literal["inner", "none"]
SELECTABLE = tuple(metric for metric in get_args(Metric) if not metric.startswith("ece"))
"""Metrics that a layer can be chosen by; a probe that predicts the shares of the classes has no calibration error."""
WITHOUT_MODEL = ("majority", "tfidf", "tokens", "length")
"""Baselines that read no activation and are equal at every layer."""
OF_LAYERS = ("shuffled", "random", "control")
"""Baselines that are fitted to the activations of each layer."""
BASELINES = (*WITHOUT_MODEL, *OF_LAYERS)


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Samples, folds, baselines and intervals of a probe sweep; each field is also a keyword of `sweep` and `sweeps`.

    >>> SweepOptions(cv=3, baselines="majority").baselines
    ('majority',)

    Attributes
    ----------
    cv : int
        Number of folds.
    groups, rows, layers, task
        Groups, rows, layers and task of the samples; see `analysis.probe_dataset.build_dataset`.
    seed : int
        Seed of the folds, the shuffles and the bootstrap.
    baselines : tuple of str
        Baselines that read no activation: ``"majority"``, the most common class of the training side (or its mean);
        ``"tfidf"``, words and pairs of words, if the store has texts; ``"tokens"``, the bag of token ids;
        ``"length"``, the number of tokens. Baselines of every layer: ``"shuffled"``, the same probe, fitted and scored
        on labels moved to other documents by one shuffle; ``"random"``, a probe of one random direction;
        ``"control"``, the same probe on labels drawn for each kind of token, which gives ``selectivity`` (Hewitt &
        Liang 2019).
    metric : str, or None
        Metric that layer and strength are chosen by; tables, plots and `Sweep.best` show it first. The default shows
        accuracy or R² first, and chooses by the log-loss of probes with probabilities, else by AUROC of two classes,
        balanced accuracy, or R².
    repeats : int
        Cross-validations with other folds, of which the first gives all other results. With 2 or more, the scores of
        all folds give the interval ``repeat_low, repeat_high``, which allows for other training samples as well (the
        corrected resampled t of Nadeau & Bengio 2003). Each repeat costs a further sweep without baselines.
    select : str
        ``"inner"`` chooses layer and strength inside the folds. ``"none"`` skips that; `Sweep.best` then states that it
        was chosen on its own scores.
    resamples : int
        Number of bootstrap resamples, for the band over layers.
    nulls : int
        Number of draws of each baseline of every layer: shuffles, control tasks, random directions. From 2 on, their
        distribution gives intervals, p-values and the spread of the selectivity.
    mdl : bool
        Measure probes that give probabilities by online coding as well: ``codelength`` in bits, and ``compression``,
        how many times shorter it is than a uniform code (Voita & Titov 2020).
    memory : int, or None
        Bytes for the samples of one layer; half of the machine's memory by default.
    progress : bool
        Show a progress bar if standard error is a terminal.
    """

    cv: int = 5
    groups: str | None = "document"
    rows: Rows | None = None
    layers: Layers = "all"
    seed: int = 0
    task: Task | None = None
    baselines: str | Sequence[str] = BASELINES
    metric: str | None = None
    repeats: int = 1
    select: Selection = "inner"
    resamples: int = 1000
    nulls: int = 1
    mdl: bool = True
    memory: int | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.baselines is None:
            raise AnalysisError(
                "baselines cannot be None", expected=f"some of {', '.join(BASELINES)}", remedy="baselines=()"
            )
        object.__setattr__(self, "baselines", listed(self.baselines, str, "baselines"))
        check_whole("resamples", self.resamples, 2)
        check_whole("nulls", self.nulls, 1)
        if self.memory is not None:
            check_whole("memory, in bytes,", self.memory, 1, remedy="for 1 GiB, write memory=2**30")
        for name in self.baselines:
            if name not in BASELINES:
                raise AnalysisError(f"there is no baseline {name!r}", remedy=nearest(name, BASELINES))
        check_whole("repeats", self.repeats, 1)
        if self.metric is not None and self.metric not in SELECTABLE:
            raise AnalysisError(
                f"no layer can be chosen by {self.metric!r}",
                expected=f"one of {', '.join(SELECTABLE)}",
                remedy=nearest(str(self.metric), SELECTABLE),
            )
        if self.select not in get_args(Selection):
            raise AnalysisError(
                f"select cannot be {self.select!r}", remedy=nearest(str(self.select), get_args(Selection))
            )

    @classmethod
    def merge(
        cls, options: SweepOptions | None, named: Mapping[str, Any], function: Callable[..., Any]
    ) -> SweepOptions:
        """Return *options*, or the defaults, with the keywords *named* of *function* in their place.

        Raises
        ------
        AnalysisError
            A keyword is not an option, or a value cannot be used.
        """
        check_keywords(function, named, (field.name for field in fields(cls)), AnalysisError)
        return replace(options or cls(), **named)
