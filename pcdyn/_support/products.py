"""Products of matrices in the whole precision of their dtype, on every device.

A GPU multiplies float32 matrices in TensorFloat-32, with eleven bits, unless the product asks for
more; no residual falls below about 1e-3 in it, and no equilibrium could be certified.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
tensordot = partial(jnp.tensordot, precision=jax.lax.Precision.HIGHEST)
