"""All-layer probe sweeps beside loops of scikit-learn over arrays that are in memory already.

    python -m benchmarks.probes [--documents 1000] [--rounds 3] [--layers 31] [--tokens 100000]

SmolLM2's residual stream at the last token of rated reviews: the embedding and 30 blocks, 10 strengths, 5 folds. (1)
Logistic regressions: FlexCache's, all folds and strengths of a layer side by side, against scikit-learn's
`LogisticRegression(solver="newton-cholesky")` one by one. (2) Ridge: FlexCache's against `RidgeCV` on each fold.
FlexCache reads its rows from the store; scikit-learn finds them in memory. The coefficients of (1) are compared. (3)
Peak memory of a whole sweep, nested, with all baselines.

Then one layer of many tokens, random numbers in documents of 100 tokens, 576 features, with ``--tokens 20000`` for a
quick look: (4) the 150 logistic regressions of a nested cross-validation, 15 training sets × 10 strengths, against
scikit-learn's L-BFGS one by one in the same precision; both objectives are compared. Where features are independent,
as in one of the two sets of numbers, L-BFGS needs five steps; where their variances fall by a power law, as those of
activations do, it needs hundreds. scikit-learn is timed on one training set of each size, at every third strength,
and multiplied. (5) Seconds and peak memory of whole sweeps of one probe over the tokens, read from the store.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.preprocessing import StandardScaler

import flexcache
from analysis import probes
from analysis.dataset.probe_dataset import build_dataset
from analysis.probes.estimators.design import Design
from analysis.probes.estimators.linear import one_hot
from analysis.probes.evaluation import crossfit, folds
from benchmarks.memory import added
from benchmarks.model import smollm2
from benchmarks.timing import interleave, ratio, show
from pipelines import capture
from pipelines.config import CaptureConfig, DocumentsSource
from pipelines.demo import assets

CS, ALPHAS, CV = np.logspace(-4, 1, 10), np.logspace(5, 0, 10), 5
SKIPPED = 3
BEFORE = """
    import flexcache
    from analysis import probes
    store = flexcache.open(sys.argv[1])
    store.documents, store.tokens, store.coordinates
    probes.sweep(store, "label", "resid_post", probes.Ridge(), layers=0, progress=False)  # loads libraries
"""
RUN = 'probes.sweep(store, "label", "resid_post", probes.Logistic(Cs=10), progress=False)'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--layers", type=int, default=31, help="31: the embedding and 30 blocks; 0 leaves (1) to (3) out"
    )
    parser.add_argument("--tokens", type=int, default=100_000, help="0 leaves (4) and (5) out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        if options.layers:
            store = build(Path(folder) / "run.zarr", options.documents)
            compare(store, options.layers, options.rounds)
        if options.tokens:
            compare_on_tokens(options.tokens, options.rounds)
            sweep_tokens(Path(folder) / "tokens.zarr", options.tokens)


def build(path: Path, documents: int) -> flexcache.Store:
    """Return a store of the input of block 0 and the output of each, at the last token."""
    config = CaptureConfig(
        model=smollm2(),
        documents=DocumentsSource(path=str(assets.vader_sample(documents))),
        sites={"resid_pre": [0], "resid_post": "all"},
        rows="last",
        store=path,
    )
    return capture.run(config)


def compare(store: flexcache.Store, count: int, rounds: int) -> None:
    dataset = build_dataset(store, "resid_post", "label")
    fold = folds.assign(dataset, CV, 0)
    sets = fold != np.arange(CV)[:, None]
    places = [("resid_pre", 0), *(("resid_post", layer) for layer in range(30))][:count]
    arrays = [store.read(site, layer, dataset.row).astype(np.float64) for site, layer in places]
    truth = one_hot(dataset.y, 2)
    found: dict[str, list[np.ndarray]] = {}

    def ours(name: str, probe: Any, strengths: np.ndarray) -> None:
        probe.classes_ = np.arange(2)
        found[name] = []
        for site, layer in places:
            rows = store.read(site, layer, dataset.row)
            found[name].append(probe.solve(Design(rows), truth, sets, strengths).coef[:, :, 0])

    def theirs() -> None:
        found["sklearn logistic"] = []
        for X in arrays:
            coef = np.empty((CV, len(CS), X.shape[1]))
            for k, held in enumerate(sets):
                scaler = StandardScaler().fit(X[held])
                scaled = scaler.transform(X[held])
                for at, C in enumerate(CS):
                    model = LogisticRegression(C=C, solver="newton-cholesky", max_iter=500).fit(scaled, dataset.y[held])
                    coef[k, at] = model.coef_[0] / scaler.scale_
            found["sklearn logistic"].append(coef)

    def theirs_ridge() -> None:
        for X in arrays:
            for held in sets:
                scaled = StandardScaler().fit_transform(X[held])
                RidgeCV(ALPHAS).fit(scaled, 2.0 * dataset.y[held] - 1)

    variants = {
        "flexcache, logistic": lambda: ours("logistic", probes.Logistic(Cs=CS), CS),
        "scikit-learn, logistic": theirs,
        "flexcache, ridge": lambda: ours("ridge", probes.Ridge(alphas=ALPHAS), ALPHAS),
        "scikit-learn, RidgeCV": theirs_ridge,
    }
    seconds = interleave(variants, rounds, warm=False)
    scale = [X.std(0) for X in arrays]
    away = max(
        float((np.linalg.norm((a - b) * s, axis=-1) / np.linalg.norm(b * s, axis=-1)).max())
        for a, b, s in zip(found["logistic"], found["sklearn logistic"], scale)
    )
    peak = added(BEFORE, RUN, str(store.path))
    show(
        f"{len(places)} layers × {len(CS)} strengths × {CV} folds, {dataset.n_samples} × {arrays[0].shape[1]}",
        [
            ("logistic ÷ newton-cholesky", f"{_r(seconds, 'logistic', 'logistic'):.3f}", "≤ 0.2"),
            ("ridge ÷ RidgeCV", f"{_r(seconds, 'ridge', 'RidgeCV'):.3f}", "≤ 0.2"),
            ("both ÷ both", f"{_both(seconds):.3f}", "≤ 0.2"),
            ("scikit-learn's distance from our coefficients, at its default tolerance", f"{away:.1e}", ""),
            (
                "the same at tol=1e-12, three layers",
                f"{exact(dataset, arrays, sets, found['logistic'], scale):.1e}",
                "≤ 1e-6",
            ),
            ("seconds of flexcache, logistic", f"{statistics.median(seconds['flexcache, logistic']):.1f}", ""),
            ("peak memory that a whole nested sweep adds", f"{peak:.0f} MiB", "a layer and its problems"),
        ],
    )


def draw_tokens(count: int, decay: float) -> tuple[np.ndarray, np.ndarray]:
    """Return activations and two classes of tokens in documents of 100; deviations of the axes fall by *decay*."""
    rng = np.random.default_rng(0)
    features, documents = 576, count // 100
    X = rng.standard_normal((documents * 100, features), np.float32)
    X += 0.3 * np.repeat(rng.standard_normal((documents, features), np.float32), 100, axis=0)
    truth = X @ rng.standard_normal(features, np.float32) / 16
    y = (rng.random(len(X)) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    axes = np.linalg.qr(rng.standard_normal((features, features)))[0] if decay else np.eye(features)
    return (X * np.arange(1.0, features + 1) ** -decay @ axes).astype(np.float32), y


def fit_ours(X: np.ndarray, y: np.ndarray, sets: np.ndarray, probe: Any, found: dict[str, Any]) -> None:
    found["flexcache"] = probe.solve(Design(X), one_hot(y, 2), sets, probe.strengths)


def fit_theirs(X: np.ndarray, y: np.ndarray, sets: np.ndarray, strengths: np.ndarray, found: dict[str, Any]) -> float:
    seconds = 0.0
    for number, times in ((0, CV), (CV, CV * (CV - 1) // 2)):
        scaled = StandardScaler().fit_transform(X[sets[number]].astype(np.float64))
        began = time.perf_counter()
        found[str(number)] = [
            LogisticRegression(C=C, max_iter=10_000).fit(scaled, y[sets[number]]) for C in strengths[::SKIPPED]
        ]
        seconds += times * (time.perf_counter() - began) * len(strengths) / len(found[str(number)])
    return seconds


def compare_on_tokens(count: int, rounds: int) -> None:
    rows: list[tuple[str, str, str]] = []
    for name, decay in (("independent features", 0.0), ("variances of a power law", 0.75)):
        X, y = draw_tokens(count, decay)
        fold = np.arange(len(X)) // 100 % CV
        sets = np.concatenate([crossfit.without_each(fold, CV), crossfit.without_pairs(fold, CV)])
        probe = probes.Logistic(Cs=10)
        probe.classes_ = np.arange(2)
        found: dict[str, Any] = {}

        seconds = interleave(
            {
                "flexcache": partial(fit_ours, X, y, sets, probe, found),
                "scikit-learn": partial(fit_theirs, X, y, sets, probe.strengths, found),
            },
            rounds,
            warm=False,
        )
        scaled = StandardScaler().fit(X[sets[0]].astype(np.float64))
        Z, scale = scaled.transform(X[sets[0]].astype(np.float64)), scaled.scale_
        behind = []
        for number, other in enumerate(found["0"]):
            at = number * SKIPPED
            C = probe.strengths[at]
            coef, intercept = found["flexcache"].coef[0, at, 0], found["flexcache"].intercept[0, at, 0]
            mine, best = (
                (w @ w) / 2 + C * np.logaddexp(0, np.where(y[sets[0]] == 1, -1, 1) * (Z @ w + b)).sum()
                for w, b in ((coef * scale, intercept + coef @ scaled.mean_), (other.coef_[0], other.intercept_[0]))
            )
            behind.append((mine - best) / best)
        rows += [
            (f"{name}: logistic ÷ L-BFGS", f"{ratio(seconds['flexcache'], seconds['scikit-learn']):.3f}", "≤ 0.2"),
            (f"{name}: largest excess of our objective", f"{max(behind):.0e}", "≤ 0"),
            (f"{name}: seconds of flexcache", f"{statistics.median(seconds['flexcache']):.1f}", ""),
        ]
    show(f"Nested 5 folds × 10 strengths, 150 fits, {count:,} × 576", rows)


TOKENS_BEFORE = """
    import flexcache
    import numpy as np
    from analysis import probes, targets
    store = flexcache.open(sys.argv[1])
    y = np.load(sys.argv[2])
    target = targets.function("class", lambda columns: y)
    options = dict(baselines=(), mdl=False, progress=False)
    probes.sweep(store, "half", "resid_post", probes.Ridge(), rows="last", **options)  # loads libraries
"""


def sweep_tokens(path: Path, count: int) -> None:
    X, y = draw_tokens(count, 0.75)
    documents = [{"id": str(i), "tokens": [i % 50] * 100, "half": i % 2} for i in range(len(X) // 100)]
    options: dict[str, Any] = {"sites": {"resid_post": (1, X.shape[1])}, "dtype": "float32", "batch_tokens": 4096}
    with flexcache.record(path, documents, model="random numbers", **options) as recorder:
        for batch in recorder.batches():
            recorder.put("resid_post", X[batch.rows], rows=batch.rows, layer=0)
    np.save(path.with_suffix(".npy"), y)
    rows = []
    for name, memory, target in (
        ("MassMean()", None, "≤ 2"),
        ("LDA(shrinkages=10)", None, "≤ 3"),
        ("Ridge(alphas=10)", None, "≤ 3"),
        ("Logistic(Cs=10)", None, ""),
        ("Logistic(Cs=10)", 200 * 10**6, ""),
    ):
        run = f"""
            import time
            began = time.perf_counter()
            probes.sweep(store, target, "resid_post", probes.{name}, memory={memory}, **options)
            Path(sys.argv[3]).write_text(str(time.perf_counter() - began))
        """
        told = path.with_suffix(".txt")
        peak = added(TOKENS_BEFORE, run, str(path), str(path.with_suffix(".npy")), str(told))
        what = name + (f", memory={memory // 10**6} MB" if memory else "")
        rows.append((f"{what}: seconds", f"{float(told.read_text()):.1f}", target))
        rows.append((f"{what}: peak memory added", f"{peak:.0f} MiB", f"{(memory or 2 * X.nbytes) / 2**20:.0f} MiB"))
    show(f"Sweeps of one layer, nested, {count:,} × 576, a layer of {X.nbytes / 2**20:.0f} MiB", rows)


def exact(
    dataset: Any, arrays: list[np.ndarray], sets: np.ndarray, found: list[np.ndarray], scale: list[np.ndarray]
) -> float:
    """Return how far FlexCache's coefficients are from scikit-learn's where that goes to its end."""
    worst = 0.0
    for at in {0, len(arrays) // 2, len(arrays) - 1}:
        for number, C in enumerate(CS):
            scaler = StandardScaler().fit(arrays[at][sets[0]])
            model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12, max_iter=500)
            theirs = model.fit(scaler.transform(arrays[at][sets[0]]), dataset.y[sets[0]]).coef_[0] / scaler.scale_
            away = np.linalg.norm((found[at][0, number] - theirs) * scale[at])
            worst = max(worst, float(away / np.linalg.norm(theirs * scale[at])))
    return worst


def _r(seconds: dict[str, list[float]], mine: str, other: str) -> float:
    return ratio(seconds[f"flexcache, {mine}"], seconds[f"scikit-learn, {other}"])


def _both(seconds: dict[str, list[float]]) -> float:
    mine = [a + b for a, b in zip(seconds["flexcache, logistic"], seconds["flexcache, ridge"])]
    other = [a + b for a, b in zip(seconds["scikit-learn, logistic"], seconds["scikit-learn, RidgeCV"])]
    return ratio(mine, other)


if __name__ == "__main__":
    main()
