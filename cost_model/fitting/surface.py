"""Surfaces on a grid from scattered rows: least squares on the nodes of a multilinear interpolation."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import scipy.sparse
import scipy.sparse.linalg

from planc.cost_model.features import Array

Mask = npt.NDArray[np.bool_]

_OUTLIER = 0.7  # off the fit by more: set aside
_SPIKE = 0.5
_TIES = 0.03  # weight of a difference between neighbouring nodes, against 1 of a row
_BENDS = 0.5  # and of a node's distance from the line through its neighbours along an axis
#: how far an octave up and an octave down is along each axis: a kernel that fills the machine goes on as it
#: is with more work, but not with less; along a third axis (groups of heads) another kernel may run
_FAR = ((1.0, 4.0), (1.0, 4.0), (2.0, 2.0))


def nodes(axes: tuple[Array, ...], coords: tuple[Array, ...], values: Array) -> tuple[Array, int]:
    """Values at the nodes whose interpolation (in the axes' logarithms) fits the rows best, and how many rows
    were set aside for being off by more than 0.7, or as a lone spike. Where rows are few or none, nodes are
    drawn to their neighbours, and along the first two axes to the line through them; nodes beyond all others
    take the value of the nearest known one (`_filled`)."""
    shape = tuple(axis.size for axis in axes)
    shares = _shares(axes, coords)
    ties = [_TIES * tie for tie in _differences(shape)]
    bends = [_BENDS * bend for bend in _bends(axes[:2], shape)]
    kept = np.ones(values.size, dtype=bool)
    smooth, spikes = np.zeros(shape), 0
    for drawn in (ties, ties + bends):  # a spike would bend its neighbours: it is set aside before
        rows, pull = shares[kept], scipy.sparse.vstack(drawn)
        normal = (rows.T @ rows + pull.T @ pull).tocsc()
        found = scipy.sparse.linalg.spsolve(normal, rows.T @ values[kept]).reshape(shape)
        known = np.asarray(rows.sum(axis=0)).reshape(shape) > 0
        smooth, spikes = without_spikes(np.where(_between(known), found, np.nan))
        kept = np.abs(values - shares @ np.where(np.isnan(smooth), found, smooth).reshape(-1)) <= _OUTLIER
    return _filled(smooth, axes), int(np.sum(~kept)) + spikes


def without_spikes(values: Array) -> tuple[Array, int]:
    """Nodes that stand out by more than 0.5 from all their known neighbours take the neighbours' median: a
    kernel that a stray event held up. And how many there were. What is not known is nan, and stays so."""
    around = np.full((2 * values.ndim, *values.shape), np.nan)
    for axis in range(values.ndim):
        here, there = np.moveaxis(around[2 * axis], axis, 0), np.moveaxis(around[2 * axis + 1], axis, 0)
        along = np.moveaxis(values, axis, 0)
        here[1:], there[:-1] = along[:-1], along[1:]
    above = values - np.fmax.reduce(around) > _SPIKE
    below = np.fmin.reduce(around) - values > _SPIKE
    found = values.copy()
    found[above | below] = np.nanmedian(around[:, above | below], axis=0)
    return found, int(np.sum(above | below))


def _between(known: Mask) -> Mask:
    """Nodes that are known, or lie between known ones along some axis."""
    found = known.copy()
    for axis in range(known.ndim):
        before = np.maximum.accumulate(known, axis=axis)
        after = np.flip(np.maximum.accumulate(np.flip(known, axis), axis=axis), axis)
        found |= before & after
    return found


def _filled(values: Array, axes: tuple[Array, ...]) -> Array:
    """Each missing node takes the value of the nearest known one, an octave being as far as `_FAR` says."""
    away = np.where(np.isnan(values), np.inf, 0.0)
    for axis, (at, (up, down)) in enumerate(zip(axes, _FAR, strict=False)):
        found, far = np.moveaxis(values, axis, 0), np.moveaxis(away, axis, 0)
        step, last = np.diff(np.log2(at)), at.size - 1
        forth = [(i, i + 1, up * step[i]) for i in range(last)]
        back = [(i + 1, i, down * step[i]) for i in reversed(range(last))]
        for here, there, more in forth + back:
            nearer = far[here] + more < far[there]
            found[there] = np.where(nearer, found[here], found[there])
            far[there] = np.where(nearer, far[here] + more, far[there])
    return values


def held_out(*coords: Array, tenth: int = 0) -> Mask:
    """About a tenth of the rows, by a hash of their coordinates."""
    mixed = np.zeros_like(coords[0])
    for prime, values in zip((7919.0, 104729.0, 1299709.0, 15485863.0), coords, strict=False):
        mixed = mixed + prime * values
    return np.asarray(np.floor(np.modf(np.abs(np.sin(mixed)) * 43758.5453)[0] * 10) == tenth)


def _shares(axes: tuple[Array, ...], coords: tuple[Array, ...]) -> scipy.sparse.csr_matrix:
    """[rows, nodes]: weights of the nodes in the interpolation at each row."""
    count = coords[0].size
    found = scipy.sparse.csr_matrix(np.ones((count, 1)))
    for axis, at in zip(axes, coords, strict=True):
        position = np.interp(np.log(at), np.log(axis), np.arange(axis.size))
        low = np.minimum(np.floor(position), max(axis.size - 2, 0)).astype(int)
        high, part, row = np.minimum(low + 1, axis.size - 1), position - low, np.arange(count)
        entries = (np.r_[1 - part, part], (np.r_[row, row], np.r_[low, high]))
        one = scipy.sparse.coo_matrix(entries, (count, axis.size)).tocsr()
        spread = scipy.sparse.kron(found, np.ones((1, axis.size))).tocsr()
        found = spread.multiply(scipy.sparse.kron(np.ones((1, found.shape[1])), one)).tocsr()
    return found


def _differences(shape: tuple[int, ...]) -> Iterator[scipy.sparse.csr_matrix]:
    """Between neighbouring nodes along each axis."""
    for axis, size in enumerate(shape):
        if size > 1:
            yield _along(axis, scipy.sparse.diags([-1.0, 1.0], [0, 1], (size - 1, size)), shape)


def _bends(axes: tuple[Array, ...], shape: tuple[int, ...]) -> Iterator[scipy.sparse.csr_matrix]:
    """Of each inner node from the line through its neighbours along each of the axes, in its logarithm."""
    for axis, at in enumerate(axes):
        if at.size > 2:
            step = np.diff(np.log(at))
            share = step[:-1] / (step[:-1] + step[1:])
            weights = [share - 1.0, np.ones_like(share), -share]
            yield _along(axis, scipy.sparse.diags(weights, [0, 1, 2], (at.size - 2, at.size)), shape)


def _along(axis: int, one: scipy.sparse.csr_matrix, shape: tuple[int, ...]) -> scipy.sparse.csr_matrix:
    """A matrix over the nodes of one axis, for each place on the others."""
    before, after = (scipy.sparse.eye(int(np.prod(s))) for s in (shape[:axis], shape[axis + 1 :]))
    return scipy.sparse.kron(scipy.sparse.kron(before, one), after)
