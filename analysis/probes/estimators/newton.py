"""Solve logistic regressions of many training sets and strengths over the same rows at once, by Newton's method.

Every problem minimises ``‖w‖² / 2 + C · Σ log-loss`` over the rows of its training set, standardised by the mean and
deviation of that set; the intercept is not penalised. All problems share the rows, so one matrix product serves all of
them: a step of conjugate gradients for 150 problems is two passes over the rows. Newton's equations are solved
inexactly (Dembo, Eisenstat & Steihaug 1982), preconditioned by the eigenvectors of the covariance of the rows, with a
halving line search. The objective is strongly convex in the coefficients, so the gradient bounds their distance from
the optimum; that bound is the certificate. More than one block of rows is left to
`analysis.probes.estimators.quasi_newton`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.probes.estimators.design import Design, Floats
from analysis.probes.estimators.quasi_newton import sets_together, solve_in_blocks, to_probability

HALVINGS = 30
CG = 400
"""Largest number of conjugate gradient steps in one Newton step."""
ARRAYS = 8
"""Number of arrays (rows, problems, classes) that are in memory at once."""
PASSES = 50
"""Passes over the rows that count as one step."""


@dataclass
class Optimum:
    """Solutions for each training set, strength and class.

    Attributes
    ----------
    coef : ndarray, (sets, strengths, classes or 1, features)
        In the units of the rows.
    intercept : ndarray, (sets, strengths, classes or 1)
    mean, scale : ndarray, (sets, features)
        Mean and scale of the standardisation of each set.
    distance : ndarray, (sets, strengths)
        Bound of the distance of the standardised coefficients from the optimum, relative to their length.
    steps : int
        Number of Newton steps.
    """

    coef: Floats
    intercept: Floats
    mean: Floats
    scale: Floats
    distance: Floats
    steps: int


def solve(
    design: Design,
    truth: Floats,
    sets: NDArray[np.bool_],
    strengths: Floats,
    *,
    tol: float,
    max_iter: int,
    budget: int = 2 << 30,
    weights: Floats | None = None,
) -> Optimum:
    """Solve the problems of all sets and strengths, by Newton's method or, for more than one block of rows, L-BFGS.

    Parameters
    ----------
    truth : (rows, classes) of 0 and 1; (rows, 1) for two classes, 1 for the second
    sets : (sets, rows)
        Training rows of each set.
    strengths : (strengths,)
        C, inverse strengths of the penalty.
    tol
        Relative distance from the optimum at which a problem is solved.
    max_iter
        Largest number of Newton steps, or of `PASSES` passes over the rows.
    budget
        Bytes for decisions and similar arrays; sets are solved together as far as it allows, at least one at a time.
    weights : (sets, classes)
        Weight of the rows of each class in the loss of each set, 1 by default; their sum is the number of rows.
    """
    each = ARRAYS * 8 * truth.size * len(strengths)
    columns = len(strengths) * truth.shape[1]
    together = max(1, budget // max(1, each)) if design.single else sets_together(design, columns)
    parts = [
        _solve(design, truth, sets[part], strengths, tol, max_iter, None if weights is None else weights[part])
        for part in (slice(first, first + together) for first in range(0, len(sets), together))
    ]
    names = ("coef", "intercept", "mean", "scale", "distance")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return replace(parts[0], **joined, steps=max(part.steps for part in parts))


def _solve(
    design: Design,
    truth: Floats,
    sets: NDArray[np.bool_],
    strengths: Floats,
    tol: float,
    max_iter: int,
    weights: Floats | None,
) -> Optimum:
    mean, scale = design.spread(sets)
    middle, unit = design.middle, design.unit
    spread = (mean - middle) / unit, scale / unit
    if design.single:
        both = np.hstack([1 - truth, truth]) if truth.shape[1] == 1 else truth
        problems = _Problems(design, truth, sets if weights is None else sets * (weights @ both.T), strengths, *spread)
        steps = 0
        while (left := problems.distance() > tol).any() and steps < max_iter and problems.step(left):
            steps += 1
        w, b, distance = np.moveaxis(problems.w, 0, -1), problems.b, problems.distance()
    else:
        w, b, distance, steps = solve_in_blocks(
            design, truth, sets, strengths, weights, spread, tol=tol, passes=max_iter * PASSES
        )
    if b.shape[1] > 1:
        b = b - b.mean(1, keepdims=True)  # only differences count
    shape = (len(sets), len(strengths), truth.shape[1])
    coef = w / unit
    return Optimum(
        coef.reshape(*shape, -1),
        (b - coef @ middle).reshape(shape),
        mean,
        scale,
        distance.reshape(shape[:2]),
        steps,
    )


class _Problems:
    """Problems solved together: coefficients (features, problems, classes), decisions (rows, problems, classes)."""

    def __init__(
        self,
        design: Design,
        truth: Floats,
        weights: NDArray[Any],
        strengths: Floats,
        mean: Floats,
        scale: Floats,
    ) -> None:
        rows, features = design.shape
        count, classes = len(weights) * len(strengths), truth.shape[1]
        total = weights.sum(1)
        self.design, self.truth = design, truth[:, None]
        self.member = np.repeat(weights.T.astype(np.float64), len(strengths), axis=1) / np.repeat(
            total, len(strengths)
        )  # share of each row in the mean loss, (rows, problems)
        self.mean = np.repeat(mean.T, len(strengths), axis=1)[..., None]
        self.scale = np.repeat(scale.T, len(strengths), axis=1)[..., None]
        self.ridge = 1 / (np.tile(strengths, len(weights)) * np.repeat(total, len(strengths)))[None, :, None]
        self.penalty = self.ridge * self.scale**2
        self.w, self.b = np.zeros((features, count, classes)), np.zeros((count, classes))
        self.decision = np.zeros((rows, count, classes))
        self.values, self.basis = design.principal
        self._refresh(np.ones(count, bool))

    def distance(self) -> Floats:
        """Return a bound of the relative distance of each problem from its optimum, (problems,)."""
        slope = (self.slope - self.mean * self.offset[None]) / self.scale  # gradient for the standardised coefficients
        length = np.sqrt(((self.scale * self.w) ** 2).sum((0, 2)))
        gradient = np.sqrt((slope**2).sum((0, 2)) + (self.offset**2).sum(1))
        return gradient / self.ridge[0, :, 0] / np.maximum(length, 1e-3)

    def step(self, left: NDArray[np.bool_]) -> bool:
        """Take a Newton step in the problems *left*; return False if no step was possible."""
        at = np.flatnonzero(left)
        direction, turn = self._direction(at)
        along = self._product(direction)
        along += turn
        slope = (self.slope[:, at] * direction).sum((0, 2)) + (self.offset[at] * turn).sum(1)
        size, start = np.ones(len(at)), self._loss(at, 0.0, direction, along)
        pending = np.arange(len(at))
        for _ in range(HALVINGS):
            tried = self._loss(at[pending], size[pending], direction[:, pending], along[:, pending])
            enough = start[pending] + 1e-4 * size[pending] * slope[pending] + 1e-13 * np.abs(start[pending])
            pending = pending[~(tried <= enough)]
            if not len(pending):
                break
            size[pending] /= 2
        size[pending] = 0.0
        self.w[:, at] += size[None, :, None] * direction
        self.b[at] += size[:, None] * turn
        self.decision[:, at] += size[None, :, None] * along
        self._refresh(left)
        return bool((size > 0).any())

    def _refresh(self, left: NDArray[np.bool_]) -> None:
        """Compute probabilities and gradients of the problems that changed."""
        if left.all():
            self.decision = self._product(self.w) + self.b  # recomputed without accumulated rounding errors
            self.probability = to_probability(self.decision.copy(), axis=2)
            wrong = self.member[..., None] * (self.probability - self.truth)
            self.slope, self.offset = self._transposed(wrong) + self.penalty * self.w, wrong.sum(0)
            return
        at = np.flatnonzero(left)
        self.probability[:, at] = to_probability(self.decision[:, at], axis=2)
        wrong = self.member[:, at, None] * (self.probability[:, at] - self.truth)
        self.slope[:, at] = self._transposed(wrong) + self.penalty[:, at] * self.w[:, at]
        self.offset[at] = wrong.sum(0)

    def _loss(self, at: NDArray[np.int64], size: Floats | float, direction: Floats, along: Floats) -> Floats:
        """Return the objectives, divided by C · n, at a step along a direction."""
        size = np.broadcast_to(size, (len(at),))
        decision = self.decision[:, at] + size[None, :, None] * along
        w = self.w[:, at] + size[None, :, None] * direction
        if decision.shape[2] == 1:
            loss = np.logaddexp(0.0, decision) - self.truth * decision
            loss = loss[..., 0]
        else:
            top = decision.max(2)
            loss = top + np.log(np.exp(decision - top[..., None]).sum(2)) - (self.truth * decision).sum(2)
        return np.asarray((self.member[:, at] * loss).sum(0) + (self.penalty[:, at] * w**2).sum((0, 2)) / 2)

    def _direction(self, at: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """Solve Newton's equations by preconditioned conjugate gradients, to a tolerance that falls with the gradient.

        Solved problems stay in the batch until they are a quarter of it, and are then removed together.
        """
        p, member, penalty = self.probability[:, at], self.member[:, at, None], self.penalty[:, at]
        weight = member * p * (1 - p) if p.shape[2] == 1 else None
        curve = (member * p * (1 - p)).sum(0).mean(1)  # mean curvature of the loss, (problems,)
        middle = 1 / np.maximum(curve, 1e-12)[:, None]
        levels = (1 / (self.values[:, None, None] * curve[:, None] + self.ridge[:, at])).astype(np.float32)
        r, r0 = -self.slope[:, at], -self.offset[at]
        first = _length(r, r0)
        wanted = np.minimum(0.1, np.sqrt(first)) * first
        found, found0 = np.zeros_like(r), np.zeros_like(r0)
        x, x0 = np.zeros_like(r), np.zeros_like(r0)
        z, z0 = self._turned(r, levels), r0 * middle
        d, d0 = z.copy(), z0.copy()
        rz = (r * z).sum((0, 2)) + (r0 * z0).sum(1)
        going = np.arange(len(at))
        for _ in range(CG):
            q = self._product(d) + d0
            q = weight * q if weight is not None else member * p * (q - (p * q).sum(2, keepdims=True))
            h, h0 = self._transposed(q), q.sum(0)
            h += penalty * d
            bend = (d * h).sum((0, 2)) + (d0 * h0).sum(1)
            a = np.where(bend > 0, rz / np.where(bend > 0, bend, 1.0), 0.0)
            x += a[:, None] * d
            x0 += a[:, None] * d0
            r -= a[:, None] * h
            r0 -= a[:, None] * h0
            still = (_length(r, r0) > wanted) & (a > 0)
            if still.sum() <= 0.75 * len(going) or not still.any():
                found[:, going], found0[going] = x, x0
                if not still.any():
                    break
                going = going[still]
                p, member, penalty, levels = p[:, still], member[:, still], penalty[:, still], levels[:, still]
                weight = None if weight is None else weight[:, still]
                x, r, d, h = x[:, still], r[:, still], d[:, still], h[:, still]
                x0, r0, d0, middle, rz, wanted = (
                    x0[still],
                    r0[still],
                    d0[still],
                    middle[still],
                    rz[still],
                    wanted[still],
                )
            z, z0 = self._turned(r, levels), r0 * middle
            new = (r * z).sum((0, 2)) + (r0 * z0).sum(1)
            share = np.divide(new, rz, out=np.zeros_like(new), where=rz > 0)[:, None]
            d *= share
            d += z
            d0 = z0 + share * d0
            rz = new
        else:
            found[:, going], found0[going] = x, x0
        return found, found0

    def _turned(self, r: Floats, levels: NDArray[np.float32]) -> Floats:
        """Return the preconditioned residuals; single precision suffices."""
        size = np.maximum(np.abs(r).max((0, 2)), np.finfo(np.float64).tiny)[:, None]
        inside = (self.basis.T @ (r / size).astype(np.float32).reshape(len(r), -1)).reshape(r.shape)
        inside *= levels
        return (self.basis @ inside.reshape(len(r), -1)).reshape(r.shape) * size

    def _product(self, w: Floats) -> Floats:
        return (self.design.standardised @ w.reshape(len(w), -1)).reshape(-1, *w.shape[1:])

    def _transposed(self, values: Floats) -> Floats:
        return (self.design.standardised.T @ values.reshape(len(values), -1)).reshape(-1, *values.shape[1:])


def _length(r: Floats, r0: Floats) -> Floats:
    return np.asarray(np.sqrt(np.einsum("fpk,fpk->p", r, r) + (r0**2).sum(1)))
