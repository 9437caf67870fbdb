"""Types that many floors speak of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from jaxtyping import Array, ArrayLike

# What comes back as it was given, with other arrays: a state, a problem, any tree of arrays.
Tree = TypeVar("Tree")
# What users may pass as an array; JAX's ArrayLike leaves lists out.
Numbers = ArrayLike | Sequence[Any]
# Arrays of JAX inside a computation, of NumPy (whose reductions give scalars of its own) once a
# result is on the host. What both can do is all that is asked of them, so that static checks need
# one of the two only.
if TYPE_CHECKING:
    Values = Array
    HostValues = np.ndarray
else:
    HostValues = np.ndarray | np.generic
    Values = Array | HostValues
# One number, such as a time, or one for each sample; on the host it can be an array of NumPy.
Scalar = Values | np.ndarray | float | int
# One array for each layer 0 … L.
Activities = tuple[Values, ...]
# One array for each layer that moves, and for what else moves.
State = tuple[Values, ...]
