"""Random linear graphs, and their equilibria and trajectories in plain NumPy and SciPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

import pcdyn


@dataclasses.dataclass(frozen=True, eq=False)
class Edge:
    """One prediction: target, sources, one weight for each, bias or mean, precision."""

    target: int
    sources: tuple[int, ...]
    weights: tuple[np.ndarray, ...]
    bias: np.ndarray
    precision: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class GraphCase:
    """A random linear graph with some units clamped: `masks` say which, `values` to what."""

    widths: tuple[int, ...]
    edges: tuple[Edge, ...]
    masks: tuple[np.ndarray, ...]
    values: tuple[np.ndarray, ...]
    taus: np.ndarray

    @property
    def graph(self) -> pcdyn.Graph:
        names = [f"n{i}" for i in range(len(self.widths))]
        predictions = []
        for edge in self.edges:
            by = edge.bias
            if edge.sources:
                weights = list(edge.weights)
                by = pcdyn.Dense(weights if len(weights) > 1 else weights[0], edge.bias)
            predictions.append(
                pcdyn.Prediction(
                    names[edge.target],
                    given=tuple(names[i] for i in edge.sources),
                    by=by,
                    energy=pcdyn.Gaussian(edge.precision),
                )
            )
        return pcdyn.Graph(dict(zip(names, self.widths, strict=True)), predictions)

    @property
    def problem(self) -> pcdyn.InferenceProblem:
        clamp = {}
        for i, (mask, value) in enumerate(zip(self.masks, self.values, strict=True)):
            if mask.any():
                given = np.where(np.broadcast_to(mask, value.shape), value, np.nan)
                clamp[f"n{i}"] = value if mask.all() else pcdyn.Partial(given, mask)
        return pcdyn.InferenceProblem(self.graph, clamp=clamp, time_constants=list(self.taus))

    def whole(self) -> tuple[np.ndarray, np.ndarray]:
        """A and c of F = ½ ‖A x − c‖², over all units."""
        ends = np.cumsum(self.widths)
        rows, rights = [], []
        for edge in self.edges:
            row = np.zeros((self.widths[edge.target], ends[-1]))
            for source, weight in zip(edge.sources, edge.weights, strict=True):
                row[:, ends[source] - self.widths[source] : ends[source]] -= weight
            start = ends[edge.target] - self.widths[edge.target]
            row[:, start : ends[edge.target]] += np.eye(self.widths[edge.target])
            root = np.linalg.cholesky(edge.precision).T
            rows.append(root @ row)
            rights.append(root @ edge.bias)
        return np.concatenate(rows), np.concatenate(rights)

    def solved(self, times: np.ndarray, sample: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """All units at equilibrium, and at `times` from zero, by dense least squares and `expm`."""
        matrix, right = self.whole()
        rows = [m if sample is None or m.ndim == 1 else m[sample] for m in self.masks]
        known = [v if sample is None else v[sample] for v in self.values]
        clamped, values = np.concatenate(rows), np.concatenate(known)
        free = ~clamped
        left = matrix[:, free]
        rest = right - matrix[:, clamped] @ values[clamped]
        whole = np.where(clamped, values, 0.0)
        end = whole.copy()
        end[free] = np.linalg.lstsq(left, rest, rcond=None)[0]
        taus = np.repeat(self.taus, self.widths)[free]
        flow = -(left.T @ left) / taus[:, None]
        course = np.repeat(whole[None], len(times), axis=0)
        for row, t in zip(course, times, strict=True):
            row[free] = end[free] - scipy.linalg.expm(flow * t) @ end[free]
        return end, course


def random_graph(
    structure: int, numbers: int, *, batch: int | None = None, differ: bool = False
) -> GraphCase:
    """Draw a graph: what is connected to what by `structure`, all numbers by `numbers`."""
    shape, draw = np.random.default_rng([1, structure]), np.random.default_rng([2, numbers])
    count = int(shape.integers(3, 7))
    widths = tuple(int(n) for n in shape.integers(1, 4, count))
    acyclic = bool(shape.integers(2))
    ways: list[tuple[int, tuple[int, ...]]] = []
    for target in range(1, count):
        # One from those before it keeps the graph together and each unit determined.
        most = int(shape.integers(1, min(target, 2) + 1))
        ways.append((target, tuple(sorted(map(int, shape.choice(target, most, replace=False))))))
    for _ in range(int(shape.integers(0, 3))):
        target = int(shape.integers(count))
        others = list(range(target)) if acyclic else list(range(count))
        if others:
            ways.append((target, (int(shape.choice(others)),)))
    ways.append((0, ()))
    shape.shuffle(ways)
    edges = []
    for target, sources in ways:
        n = widths[target]
        root = draw.normal(size=(n, n))
        edges.append(
            Edge(
                target,
                sources,
                tuple(0.8 * draw.normal(size=(n, widths[s])) / np.sqrt(widths[s]) for s in sources),
                draw.normal(size=n),
                root @ root.T / n + np.diag(draw.uniform(0.3, 2.0, n)),
            )
        )
    leading = () if batch is None else (batch,)
    masks, free = [], 0
    for i, n in enumerate(widths):
        kind = int(shape.integers(4)) if i < count - 1 or free else 0
        mask = np.zeros(n, bool)
        if kind == 1:
            mask[:] = True
        elif kind > 1:
            mask[draw.permutation(n)[: int(shape.integers(n))]] = True
        free += int((~mask).sum())
        if differ and mask.any() and not mask.all() and batch is not None:
            mask = draw.permuted(np.repeat(mask[None], batch, axis=0), axis=1)
            mask[0] = False
        masks.append(mask)
    values = tuple(draw.normal(size=(*leading, n)) for n in widths)
    return GraphCase(widths, tuple(edges), tuple(masks), values, draw.uniform(0.5, 2.0, count))
