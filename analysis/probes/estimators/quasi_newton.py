"""Solve logistic regressions over many rows, by L-BFGS with one preconditioner for all of them.

The problems are those of `analysis.probes.estimators.newton`. Here a step is one pass over the rows, block by block:
one product gives the decisions of all problems, another one their gradients, and the rows of a fold are only multiplied
with the problems that train on it. No array has the size of rows × problems. A Hessian would cost rows × features²
operations a problem; instead, L-BFGS (Nocedal 1980) starts from the covariance of all rows, scaled by the mean
curvature of the loss. The line search compares slopes, which unlike losses are exact near the optimum: a step that
overshoots is shortened in the next pass, while the other problems go on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from analysis.probes.estimators.design import CELLS, Design, Floats, Ints, split_rows

PAIRS = 8
"""Number of earlier steps that L-BFGS remembers."""
OVERSHOOT = 0.5
"""Largest slope at the end of a step, as a share of that at its start."""
DROP = 0.1
"""Share of solved problems from which they are removed from the batch."""


def solve_in_blocks(
    design: Design,
    truth: Floats,
    sets: NDArray[np.bool_],
    strengths: Floats,
    weights: Floats | None,
    spread: tuple[Floats, Floats],
    *,
    tol: float,
    passes: int,
) -> tuple[Floats, Floats, Floats, int]:
    """Solve the problems of all sets and strengths.

    Parameters
    ----------
    truth, sets, strengths, weights
        See `newton.solve`.
    spread
        Mean and deviation of each set in common units, (sets, features) each.
    passes
        Largest number of passes over the rows.

    Returns
    -------
    coefficients, intercepts : (problems, classes, features) and (problems, classes), in common units
    distances : (problems,)
    passes : int
    """
    problems = _Problems(design, truth, sets, strengths, weights, spread)
    every = np.arange(len(problems.ridge))
    found = np.zeros((len(every), truth.shape[1], design.shape[1] + 1))
    distance = np.full(len(every), np.inf)
    state = _State(every, found.copy(), *problems.evaluate(every, found))
    state.turn(problems)
    number = 0
    while number < passes:
        number += 1
        slope, curve = problems.evaluate(state.at, state.tried())
        state.advance(slope, curve)
        away = problems.distance(state.at, state.w, state.slope)
        found[state.at], distance[state.at] = state.w, away
        if (away <= tol).all():
            break
        if (away <= tol).mean() > DROP:
            state.keep(away > tol)
        state.turn(problems)
    return found[..., :-1], found[..., -1], distance, number


@dataclass
class _State:
    """Problems that are not solved yet; the last coefficient is the intercept.

    Attributes
    ----------
    at : (problems,)
        Numbers of the problems.
    w, slope, direction : (problems, classes, features + 1)
        Coefficients, gradients there, and the direction of the step.
    curve : (problems,)
        Mean curvature of the loss.
    size : (problems,)
        Size of the step, as a multiple of the direction.
    """

    at: Ints
    w: Floats
    slope: Floats
    curve: Floats

    def __post_init__(self) -> None:
        self.direction, self.size = np.zeros_like(self.w), np.ones(len(self.at))
        self.fresh = np.ones(len(self.at), bool)  # problems that need a new direction
        self.pairs: list[tuple[Floats, Floats, Floats]] = []

    def tried(self) -> Floats:
        """Return the coefficients at the end of the step."""
        return self.w + self.size[:, None, None] * self.direction

    def advance(self, slope: Floats, curve: Floats) -> None:
        """Take the steps that end at gradients *slope*, except those that overshoot, which are shortened."""
        before, after = _dot(self.slope, self.direction), _dot(slope, self.direction)
        self.fresh = taken = after <= OVERSHOOT * np.abs(before)
        move = np.where(taken, self.size, 0.0)[:, None, None] * self.direction
        turn = np.where(taken[:, None, None], slope - self.slope, 0.0)
        bend = _dot(move, turn)
        self.pairs.append((move, turn, np.divide(1.0, bend, out=np.zeros_like(bend), where=bend > 0)))
        del self.pairs[:-PAIRS]
        self.w = self.w + move
        self.slope = self.slope + turn
        self.curve = np.where(taken, curve, self.curve)
        with np.errstate(divide="ignore", invalid="ignore"):
            shorter = self.size * np.clip(np.nan_to_num(before / (before - after), nan=0.1), 0.1, 0.9)
        self.size = np.where(taken, 1.0, shorter)

    def turn(self, problems: _Problems) -> None:
        """Compute the directions of the problems that have moved, by the two loops of L-BFGS."""
        q, shares = self.slope.copy(), []
        for move, turn, inverse in reversed(self.pairs):
            share = inverse * _dot(move, q)
            q -= share[:, None, None] * turn
            shares.append(share)
        z = problems.precondition(self.at, q, self.curve)
        for (move, turn, inverse), share in zip(self.pairs, reversed(shares), strict=True):
            z += (share - inverse * _dot(turn, z))[:, None, None] * move
        self.direction = np.where(self.fresh[:, None, None], -z, self.direction)

    def keep(self, left: NDArray[np.bool_]) -> None:
        """Remove the problems that are not *left*."""
        for name in ("at", "w", "slope", "curve", "direction", "size", "fresh"):
            setattr(self, name, getattr(self, name)[left])
        self.pairs = [(move[left], turn[left], inverse[left]) for move, turn, inverse in self.pairs]


class _Problems:
    """Objectives of all sets and strengths, divided by C · n."""

    def __init__(
        self,
        design: Design,
        truth: Floats,
        sets: NDArray[np.bool_],
        strengths: Floats,
        weights: Floats | None,
        spread: tuple[Floats, Floats],
    ) -> None:
        count = len(strengths)
        kinds, self.part_of = split_rows(sets)
        self.design, self.truth, self.weights = design, truth, weights
        self.set_of = np.repeat(np.arange(len(sets)), count)
        self.member = kinds[self.set_of]
        self.total = sets.sum(1).astype(np.float64)[self.set_of]
        self.ridge = 1 / (np.tile(strengths, len(sets)) * self.total)
        self.mean, self.scale = spread

    def evaluate(self, at: Ints, w: Floats) -> tuple[Floats, Floats]:
        """Return gradients and mean curvatures of the problems *at* in one pass over the rows."""
        features, unit, classes = self.design.shape[1], self.design.unit, w.shape[1]
        slope, curve = np.zeros_like(w), np.zeros(len(at))
        inside = [np.flatnonzero(member) for member in self.member[at].T]
        chosen = [(w[one, :, :-1] / unit).reshape(-1, features) for one in inside]
        for place, part, rows in self.design.parts(self.part_of, w.shape[0] * classes):
            one = inside[part]
            if not len(one):
                continue
            decision = (chosen[part] @ rows.T).reshape(len(one), classes, -1)
            decision += w[one, :, -1:]
            p = to_probability(decision, axis=1)
            weight = None if self.weights is None else self._weight(place)[self.set_of[at[one]], None]
            bend = np.einsum("pkn,pkn->p", p, p) if weight is None else ((p * p) * weight).sum((1, 2))
            curve[one] += (p.sum((1, 2)) if weight is None else (p * weight).sum((1, 2))) - bend
            p -= self.truth[place].T
            if weight is not None:
                p *= weight
            slope[one, :, :-1] += (p.reshape(-1, len(place)) @ rows).reshape(len(one), classes, features)
            slope[one, :, -1] += p.sum(2)
        slope /= self.total[at, None, None]
        slope[..., :-1] /= unit
        slope[..., :-1] += self.ridge[at, None, None] * self.scale[self.set_of[at], None] ** 2 * w[..., :-1]
        return slope, curve / self.total[at] / classes

    def distance(self, at: Ints, w: Floats, slope: Floats) -> Floats:
        """Return a bound of the relative distance of each problem from its optimum, (problems,)."""
        mean, scale = self.mean[self.set_of[at], None], self.scale[self.set_of[at], None]
        own = (slope[..., :-1] - mean * slope[..., -1:]) / scale  # gradient for the standardised coefficients
        length = np.sqrt(((scale * w[..., :-1]) ** 2).sum((1, 2)))
        gradient = np.sqrt((own**2).sum((1, 2)) + (slope[..., -1] ** 2).sum(1))
        return np.asarray(gradient / self.ridge[at] / np.maximum(length, 1e-3))

    def precondition(self, at: Ints, r: Floats, curve: Floats) -> Floats:
        """Return vectors times the inverse of the common curvature of the problems; single precision suffices."""
        values, basis = self.design.principal
        curve = np.maximum(curve, 1e-12)[:, None, None]
        size = np.maximum(np.abs(r[..., :-1]).max((1, 2), keepdims=True), np.finfo(np.float64).tiny)
        turned = ((r[..., :-1] / size).astype(np.float32).reshape(-1, len(basis)) @ basis).reshape(
            len(r), -1, len(basis)
        )
        turned /= (values * curve + self.ridge[at, None, None]).astype(np.float32)
        found = np.empty_like(r)
        found[..., :-1] = (turned.reshape(-1, len(basis)) @ basis.T).reshape(turned.shape) * size
        found[..., -1] = r[..., -1] / curve[..., 0]
        return found

    def _weight(self, place: Ints) -> Floats:
        """Return the weight of the rows *place* in the loss of every set, (sets, rows)."""
        assert self.weights is not None
        known = self.truth[place]
        return np.asarray(self.weights @ (np.hstack([1 - known, known]) if known.shape[1] == 1 else known).T)


def sets_together(design: Design, columns: int) -> int:
    """Return how many sets of *columns* problems each are solved together: arrays of at most half of the rows."""
    budget = max(16 * CELLS, 2 * design.shape[0] * design.shape[1])
    return max(1, budget // ((2 * PAIRS + 8) * 8 * (design.shape[1] + 1) * columns))


def to_probability(decision: Floats, axis: int) -> Floats:
    """Overwrite decisions with probabilities; the classes are along *axis*, of one entry for two classes."""
    if decision.shape[axis] == 1:
        np.negative(decision, out=decision)
        with np.errstate(over="ignore"):  # the probability is then 0
            np.exp(decision, out=decision)
        decision += 1
        return np.reciprocal(decision, out=decision)
    decision -= decision.max(axis, keepdims=True)
    np.exp(decision, out=decision)
    decision /= decision.sum(axis, keepdims=True)
    return decision


def _dot(a: Floats, b: Floats) -> Floats:
    return np.asarray(np.einsum("pkf,pkf->p", a, b))
