"""The experiments of docs/replay.md, on the store that `flexcache demo` makes; prints the figures, draws the pictures.

    flexcache demo --documents 300 -o demo
    python -m benchmarks.replay_pictures demo/smollm2.zarr [--images docs/images]

(1) The identity error of every layer. (2) The massive activation (Sun et al. 2024): its zero, its mean, a control.
(3) The sentiment direction: dose and response on documents that it was not made from, beside controls; erased by LEACE.
(4) Donors of the other label, patched position by position.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import flexcache
from analysis import replay
from analysis.replay.sweeps.charts import plot
from analysis.replay.sweeps.inference import sign_flip
from benchmarks.timing import console
from flexcache.model import ModelSource
from flexcache.store.read.store import Store
from pipelines.demo import assets

LAYER, LATER = 16, 24
SUFFIX = " Overall, the film was"
DRAWS = 3
"""Random directions that the sentiment direction is compared with."""
SHORT = 16
"""Tokens up to which documents are steered: a slow machine has to wait less."""
MASSIVE, CONTROL = 507, 100
"""Dims of the residual stream after block 12."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", type=Path)
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--only", choices=["identity", "massive", "sentiment", "patching"])
    options = parser.parse_args()
    store = flexcache.open(options.store)
    recorded = store.ledger.read_record(int(store.committed_units[0])).fingerprint
    torch.set_num_threads(recorded["threads"] or 1)
    model = ModelSource(name=str(assets.smollm2()), dtype=recorded["compute_dtype"], device="cpu").load()
    ids = [str(name) for name in store.documents["id"].to_pylist()]
    if options.only in (None, "identity"):
        errors = [replay.identity_error(store, model, layer=layer, documents=ids[-4:]) for layer in range(30)]
        console.print(f"identity error, {recorded['compute_dtype']}: {max(errors)} at most over {len(errors)} layers")
    if options.only in (None, "massive"):
        massive(store, model, ids[:60])
    if options.only in (None, "sentiment"):
        sentiment(store, model, options.images)
    if options.only in (None, "patching"):
        patching(store, model, options.images)


def massive(store: Store, model: torch.nn.Module, ids: list[str]) -> None:
    edits = replay.Zero((MASSIVE,)) | replay.Mean((MASSIVE,), over="position") | replay.Zero((CONTROL,))
    found = replay.sweep(store, model, replay.grid(layers=12, positions="first"), edits, ["loss"], documents=ids)
    effect = found.effect().squeeze()
    console.print(f"loss without an edit: {float(effect['mean'].sel(arm='identity')[0]):.2f}")
    for name in effect["edit"].values:
        at = effect.sel(arm="edit", edit=name)
        console.print(f"  {name}: {float(at['mean']):.2f} [{float(at['ci_low']):.2f}, {float(at['ci_high']):.2f}]")


def sentiment(store: Store, model: torch.nn.Module, images: Path) -> None:
    table = store.documents
    ids = [str(name) for name in table["id"].to_pylist()]
    y = np.array([label == "positive" or label == "pos" for label in table["label"].to_pylist()])
    last = store.rows(position=-1)
    train = np.random.default_rng(0).permutation(len(ids)) < len(ids) // 2
    X, later = (store.read("resid_post", layer, last).astype(np.float64) for layer in (LAYER, LATER))
    direction = X[train & y].mean(0) - X[train & ~y].mean(0)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000)).fit(later[train], y[train])
    console.print(f"probe at layer {LATER}, on held-out documents: {probe.score(later[~train], y[~train]):.3f}")
    scale, line = probe[0], probe[1]
    weights = line.coef_[0] / scale.scale_
    bias = float(line.intercept_[0] - weights @ scale.mean_)
    eraser = replay.Erase.fit(X[train], y[train])
    tokenizer = ModelSource(name=str(assets.smollm2())).tokenizer()
    good, bad = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in (" good", " bad"))
    steer = replay.Steer(direction, alpha=[-4, 0, 4])
    short = table["n_tokens"].to_numpy() <= SHORT
    held = ~train & short
    found = replay.sweep(
        store,
        model,
        replay.grid(layers=LAYER, positions="last"),
        steer | steer >> eraser,
        [replay.projection("later probe", weights, layer=LATER, bias=bias), "logit_diff_change", "kl"],
        ["identity", "random_direction", "norm_matched"],
        answers=(good, bad),
        documents=[name for name, asked in zip(ids, held, strict=True) if asked],
        readout="last",
    )
    effect = found.effect().squeeze()
    for metric in ("later probe", "logit_diff_change"):
        console.print(metric)
        for edit in effect["edit"].values:
            for arm in effect["arm"].values:
                means = effect["mean"].sel(edit=edit, arm=arm, metric=metric).values
                console.print(f"  {edit}, {arm}: " + ", ".join(f"{value:+.2f}" for value in means))
        p = effect["p_adjusted_norm_matched"].sel(edit=effect["edit"].values[0], metric=metric).values
        console.print("  adjusted p against norm matched: " + ", ".join(f"{value:.4f}" for value in p))
    probes = found.results["value"].sel(metric="later probe", arm="edit", alpha=0).squeeze()
    label = dict(zip(ids, y, strict=True))
    sign = np.array([label[name] for name in probes["document"].values])
    for edit in probes["edit"].values:
        right = ((probes.sel(edit=edit).values > 0) == sign).mean()
        console.print(f"accuracy of the later probe at strength 0, {edit}: {right:.3f}")
    asked = [text for text, told in zip(table["text"].to_pylist(), held, strict=True) if told][:30]
    logits(store, model, [text + SUFFIX for text in asked], direction, (good, bad))
    for metric, name in (("later probe", "steering-probe"), ("logit_diff_change", "steering-logits")):
        plot(found.results, metric=metric).savefig(images / f"{name}.png", dpi=110)


def logits(
    store: Store, model: torch.nn.Module, texts: list[str], direction: np.ndarray, answers: tuple[int, int]
) -> None:
    """Steer where the next word is one of judgement: documents with a beginning of a sentence after them."""
    documents = [{"id": f"{n}", "text": text} for n, text in enumerate(texts)]
    tokenizer = ModelSource(name=str(assets.smollm2())).tokenizer()
    moved: dict[str, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as folder:
        asked = flexcache.capture(
            model, tokenizer, documents, f"{folder}/asked.zarr", layers=[LAYER], batch_tokens=1024, progress=False
        )
        for seed in range(DRAWS):
            found = replay.sweep(
                asked,
                model,
                replay.grid(layers=LAYER, positions="last"),
                replay.Steer(direction, alpha=[-4, 4]),
                ["logit_diff_change"],
                ["random_direction", "norm_matched"] if seed else ["identity", "random_direction", "norm_matched"],
                answers=answers,
                readout="last",
                seed=seed,
            )
            for arm in found.arms:
                value = found.results["value"].sel(arm=arm).squeeze()
                moved.setdefault(arm, []).append((value.sel(alpha=4) - value.sel(alpha=-4)).values / 2)
    console.print(f"logit of good less bad after {SUFFIX!r}: half of what +4 changes less what -4 does")
    for arm, draws in moved.items():
        means = [float(draw.mean()) for draw in draws]
        console.print(f"  {arm}: " + ", ".join(f"{mean:+.2f}" for mean in means))
    for arm in ("random_direction", "norm_matched"):
        chance = np.abs(np.stack(moved[arm])).mean(0)  # of either sign: a random direction has none of its own
        p = sign_flip((moved["edit"][0] - chance)[:, None], np.arange(len(chance))).p
        console.print(f"  p, more than the size of {arm}: {float(p[0]):.4f}")


def patching(store: Store, model: torch.nn.Module, images: Path) -> None:
    donors = replay.same_length(store, seed=0, differing="label")
    lengths = dict(zip(store.documents["id"].to_pylist(), store.documents["n_tokens"].to_pylist(), strict=True))
    chosen = [name for name in donors if 6 <= lengths[name] <= SHORT]
    found = replay.sweep(
        store,
        model,
        replay.grid(layers="1::7", positions=list(range(-6, 0))),
        replay.Patch(donors, align="end"),
        ["kl"],
        documents=chosen,
        readout="last",
    )
    console.print(repr(found))
    plot(found.results, metric="kl").savefig(images / "patching.png", dpi=110)


if __name__ == "__main__":
    main()
