"""The Rosenbrock method Rodas5P as a diffrax solver: one factorisation and no Newton iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, PyTree

from pcdyn._support.products import tensordot
from pcdyn._support.types import Scalar
from pcdyn.integrators.structured import (
    PaddedChain,
    factorise,
    sample_hessians,
    shifted,
)
from pcdyn.model.driven import Interval
from pcdyn.model.flow import depends_on_time
from pcdyn.model.problem import InferenceFlow, InferenceProblem
from pcdyn.model.stacked import StackedProblem


def _square(rows: tuple[tuple[float, ...], ...]) -> np.ndarray:
    return np.array([(*row, *[0.0] * (len(rows) - len(row))) for row in rows])


_GAMMA = 0.21193756319429014
# Row i: the weights of the increments 1 … i−1 in the state of stage i. Stages 7 and 8 and the
# solution each add one increment to the state of stage 6 and what follows it.
_STATE_WEIGHTS = (
    (),
    (3.0,),
    (2.849394379747939, 0.45842242204463923),
    (-6.954028509809101, 2.489845061869568, -10.358996098473584),
    (2.8029986275628964, 0.5072464736228206, -0.3988312541770524, -0.04721187230404641),
    (-7.502846399306121, 2.561846144803919, -11.627539656261098, -0.18268767659942256,
     0.030198172008377946),
)  # fmt: skip
_STATE_WEIGHTS = (*_STATE_WEIGHTS, (*_STATE_WEIGHTS[5], 1.0), (*_STATE_WEIGHTS[5], 1.0, 1.0))
_SOLUTION_WEIGHTS = (*_STATE_WEIGHTS[7], 1.0)
# Row i: the weights of the increments 1 … i−1, over dt, on the right-hand side of stage i.
_RATE_WEIGHTS = (
    (),
    (-14.155112264123755,),
    (-17.97296035885952, -2.859693295451294),
    (147.12150275711716, -1.41221402718213, 71.68940251302358),
    (165.43517024871676, -0.4592823456491126, 42.90938336958603, -5.961986721573306),
    (24.854864614690072, -3.0009227002832186, 47.4931110020768, 5.5814197821558125,
     -0.6610691825249471),
    (30.91273214028599, -3.1208243349937974, 77.79954646070892, 34.28646028294783,
     -19.097331116725623, -28.087943162872662),
    (37.80277123390563, -3.2571969029072276, 112.26918849496327, 66.9347231244047,
     -40.06618937091002, -54.66780262877968, -9.48861652309627),
)  # fmt: skip
# Where between the start and the end of a step each stage is, and how much of dt · ∂f/∂t its
# right-hand side has: the row sums of the method's own coefficients (Hairer & Wanner, Solving ODEs
# II, IV.7), of which the weights above are a transformation.
_COUPLINGS = np.linalg.inv(np.eye(len(_RATE_WEIGHTS)) / _GAMMA - _square(_RATE_WEIGHTS))
_STAGE_TIMES = np.sum(_square(_STATE_WEIGHTS) @ _COUPLINGS, axis=1)
_SLOPE_WEIGHTS = np.sum(_COUPLINGS, axis=1)
# The three coefficients of the dense output, as weights of the increments 1 … 8.
_DENSE_WEIGHTS = np.array((
    (25.948786856663858, -2.5579724845846235, 10.433815404888879, -2.3679251022685204,
     0.524948541321073, 1.1241088310450404, 0.4272876194431874, -0.17202221070155493),
    (-9.91568850695171, -0.9689944594115154, 3.0438037242978453, -24.495224566215796,
     20.176138334709044, 15.98066361424651, -6.789040303419874, -6.710236069923372),
    (11.419903575922262, 2.8879645146136994, 72.92137995996029, 80.12511834622643,
     -52.072871366152654, -59.78993625266729, -0.15582684282751913, 4.883087185713722),
))  # fmt: skip


class QuarticInterpolation(diffrax.AbstractLocalInterpolation):
    """Dense output of order 4 of a Rodas step: y0, y1 and three coefficients."""

    # Numbers, for which static checks let no narrower type replace diffrax's abstract fields.
    t0: PyTree[Scalar]
    t1: PyTree[Scalar]
    y0: PyTree
    y1: PyTree
    coefficients: tuple[PyTree, PyTree, PyTree]

    def evaluate(self, t0: Scalar, t1: Scalar | None = None, left: bool = True) -> PyTree:
        """Compute the state at t0, or its change from t0 to t1."""
        if t1 is not None:
            return jax.tree.map(jnp.subtract, self.evaluate(t1), self.evaluate(t0))
        length = jnp.asarray(self.t1 - self.t0)
        elapsed = jnp.asarray(t0 - self.t0)
        s = jnp.where(length == 0, 0, elapsed / jnp.where(length == 0, 1, length))

        def at(y0: Array, y1: Array, a: Array, b: Array, c: Array) -> Array:
            return (1 - s) * (y0 + s * (a + s * (b + s * c))) + s * y1

        return jax.tree.map(at, self.y0, self.y1, *self.coefficients)


class Rodas5P(diffrax.AbstractAdaptiveSolver):
    """Steinebach's L-stable Rosenbrock–Wanner method of order 5 with an embedded one of order 4.

    A step takes the Jacobian at its start (and the derivative by time, of a field that depends on
    it), one factorisation and eight evaluations, each with one solve; nothing is iterated. With a
    `problem` the matrix is T/(γ dt) + H, block tridiagonal for each sample: O(batch · Σ n_l³);
    without one it is dense. Where T/(γ dt) + H is not positive definite the step is NaN, which
    diffrax rejects.

    G. Steinebach, Construction of Rosenbrock–Wanner method Rodas5P and numerical benchmarks within
    the Julia Differential Equations package, BIT Numerical Mathematics 63:27, 2023.
    """

    problem: InferenceFlow | Interval | None = None

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = QuarticInterpolation
    stages: ClassVar[int] = len(_STATE_WEIGHTS)

    def order(self, terms: PyTree) -> int:
        """Return 5; the error estimate is that of the embedded method of order four."""
        return 5

    def init(self, terms: PyTree, t0: Scalar, t1: Scalar, y0: PyTree, args: PyTree) -> None:
        """Carry nothing from step to step."""

    def func(self, terms: PyTree, t0: Scalar, y0: PyTree, args: PyTree) -> PyTree:
        """Evaluate the vector field, as diffrax asks a solver to."""
        return terms.vf(t0, y0, args)

    def step(
        self,
        terms: PyTree,
        t0: Scalar,
        t1: Scalar,
        y0: PyTree,
        args: PyTree,
        solver_state: None,
        made_jump: Scalar,
    ) -> tuple[PyTree, PyTree, dict[str, PyTree], None, diffrax.RESULTS]:
        """Take one step from t0 to t1, its error estimate and its dense output."""
        dt = jnp.asarray(t1 - t0)

        def field(t: Scalar, y: PyTree) -> PyTree:
            return terms.vf(t, y, args)

        solution = self._stage_solver(lambda y: field(t0, y), t0, y0, _GAMMA * dt)
        slope = None
        changes = self.problem is None or isinstance(self.problem, Interval)
        if changes and depends_on_time(field, t0, y0):
            _, slope = jax.jvp(lambda t: field(t, y0), (t0,), (jnp.ones_like(t0),))

        # A loop, for eight copies of the field take long to compile.
        def stage(i: Array, increments: PyTree) -> PyTree:
            state = _plus(y0, jnp.asarray(_square(_STATE_WEIGHTS), dt.dtype)[i], increments)
            rate = field(t0 + jnp.asarray(_STAGE_TIMES, dt.dtype)[i] * dt, state)
            if slope is not None:
                share = jnp.asarray(_SLOPE_WEIGHTS, dt.dtype)[i] * dt
                rate = jax.tree.map(lambda v, dv: v + share * dv, rate, slope)
            weights = jnp.asarray(_square(_RATE_WEIGHTS), dt.dtype)[i] / dt
            increment = solution(_plus(rate, weights, increments))
            return jax.tree.map(lambda x, xs: xs.at[i].set(x), increment, increments)

        none = jax.tree.map(lambda x: jnp.zeros((self.stages, *x.shape), x.dtype), y0)
        increments = jax.lax.fori_loop(0, self.stages, stage, none)
        y1 = _plus(y0, np.asarray(_SOLUTION_WEIGHTS), increments)
        zero = jax.tree.map(jnp.zeros_like, y0)
        dense = tuple(_plus(zero, weights, increments) for weights in _DENSE_WEIGHTS)
        info = {"y0": y0, "y1": y1, "coefficients": dense}
        error = jax.tree.map(lambda x: x[-1], increments)
        return y1, error, info, None, diffrax.RESULTS.successful

    def _stage_solver(
        self, field: Callable[[PyTree], PyTree], t0: Scalar, y0: PyTree, scaled_dt: Scalar
    ) -> Callable[[PyTree], PyTree]:
        """What solves (1/(γ dt) − ∂f/∂y) k = rhs."""
        if isinstance(self.problem, StackedProblem):
            (tau,), (x,) = self.problem.state_time_constants, y0
            chain = PaddedChain(self.problem.free_widths)
            tau = jnp.broadcast_to(tau, x.shape)
            _, product = jax.linearize(lambda x: field((x,))[0], x)
            factors = chain.factorise(chain.blocks(lambda v: tau * (v / scaled_dt - product(v)), x))
            return lambda rhs: factors.solve((tau * rhs[0],))
        problem = self.problem
        if isinstance(problem, Interval):
            problem = problem.at(t0)
        if isinstance(problem, InferenceProblem):
            taus = problem.state_time_constants
            matrix = shifted(sample_hessians(problem, y0), taus, 1 / scaled_dt)
            factors = factorise(matrix)
            return lambda rhs: factors.solve(tuple(t * x for t, x in zip(taus, rhs, strict=True)))
        _, product = jax.linearize(field, y0)
        like = jax.eval_shape(lambda: y0)
        operator = lx.FunctionLinearOperator(
            lambda v: jax.tree.map(lambda x, jx: x / scaled_dt - jx, v, product(v)), like
        )
        solver = lx.LU()
        state = solver.init(operator, {})
        return lambda rhs: solver.compute(state, rhs, {})[0]


def _plus(start: PyTree, weights: Array | np.ndarray, increments: PyTree) -> PyTree:
    """start + Σ weight · increment, the increments along the leading axis."""
    return jax.tree.map(
        lambda x, k: x + tensordot(jnp.asarray(weights, k.dtype), k, 1), start, increments
    )
