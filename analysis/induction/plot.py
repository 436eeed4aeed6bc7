"""Draw two scores by layer and head, and the loss by position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.induction.scores import LOSS, SCORES
from analysis.plot_style import INK, PAPER, SOFT, frame, save_figure
from analysis.probes.plot import COLOURS

TITLES = {"induction": "induction score", "previous_token": "previous-token score"}


def plot(scores: xr.Dataset, loss: xr.DataArray, chance: float, path: str | Path | None = None) -> Figure:
    """Draw the results of `head_scores` and `loss_by_position`, the last layer on top, without pyplot.

    ::

        plot(head_scores(store), loss_by_position(store), chance=math.log(vocabulary), path="induction.svg")


    Parameters
    ----------
    chance
        Loss in nats of a uniform guess, drawn as a line.
    path
        Path of the image, PNG or SVG.
    """
    figure = Figure(figsize=(9.5, 4.4), layout="constrained", facecolor=PAPER)
    axes = figure.subplot_mosaic([["induction", LOSS], ["previous_token", LOSS]], width_ratios=[1, 1.5])
    for name in SCORES:
        _heads(axes[name], scores[name], TITLES[name])
    _loss(axes[LOSS], loss, chance)
    return save_figure(figure, path)


def _heads(axes: Axes, score: xr.DataArray, title: str) -> None:
    values = score.transpose("layer", "head").values
    axes.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for (line, column), value in np.ndenumerate(values):
        colour = PAPER if value > 0.6 else INK
        axes.text(column, line, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10)
    axes.set_xticks(range(values.shape[1]), score["head"].values)
    axes.set_yticks(range(values.shape[0]), score["layer"].values)
    axes.set_xlabel("head", color=INK)
    axes.set_ylabel("layer", color=INK)
    axes.set_title(title, loc="left", color=INK, fontsize=11)
    axes.tick_params(length=0, labelcolor=SOFT)
    axes.spines[:].set_visible(False)


def _loss(axes: Axes, loss: xr.DataArray, chance: float) -> None:
    seam, position = loss.attrs["half"], loss["position"].values
    axes.axhline(chance, color=SOFT, linewidth=1.3, linestyle=(0, (1.5, 2)))
    axes.text(position[-1], chance * 0.97, "guessing", color=SOFT, fontsize=9, ha="right", va="top")
    axes.axvline(seam, color=COLOURS["tfidf"], linewidth=1.3, linestyle=(0, (6, 3)))
    axes.plot(position, loss.values, color=COLOURS["probe"], linewidth=2.0, marker="o", markersize=3.5)
    axes.set_ylim(0, max(chance, float(loss.max())) * 1.12)
    axes.text(seam - 0.6, axes.get_ylim()[1] * 0.03, "the copy begins", color=COLOURS["tfidf"], fontsize=9, ha="right")
    axes.set_title("loss", loc="left", color=INK, fontsize=11)
    axes.set_xlabel("position of the predicted token", color=INK)
    axes.set_ylabel("nats", color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(x=0.02)
    frame(axes)
