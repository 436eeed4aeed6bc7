"""All-layer probe sweeps beside loops of scikit-learn over arrays that are in memory already.

    python -m benchmarks.probes [--documents 1000] [--rounds 3] [--layers 31]

SmolLM2's residual stream at the last token of rated reviews: the embedding and 30 blocks, 10 strengths, 5 folds. (1)
Logistic regressions: FlexCache's, all folds and strengths of a layer side by side, against scikit-learn's
`LogisticRegression(solver="newton-cholesky")` one by one. (2) Ridge: FlexCache's against `RidgeCV` on each fold.
FlexCache reads its rows from the store; scikit-learn finds them in memory. The coefficients of (1) are compared. (3)
Peak memory of a whole sweep, nested, with all baselines.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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
from analysis.probes.evaluation import folds
from benchmarks.memory import added
from benchmarks.model import smollm2
from benchmarks.timing import interleave, ratio, show
from pipelines import capture
from pipelines.config import CaptureConfig, DocumentsSource
from pipelines.demo import assets

CS, ALPHAS, CV = np.logspace(-4, 1, 10), np.logspace(5, 0, 10), 5
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
    parser.add_argument("--layers", type=int, default=31, help="31: the embedding and 30 blocks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-") as folder:
        store = build(Path(folder) / "run.zarr", options.documents)
        compare(store, options.layers, options.rounds)


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
