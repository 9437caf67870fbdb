"""Newton's method for implicit steps of a fixed size, which cannot ask for a smaller step."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from optimistix import RESULTS, Newton


class PatientNewton(Newton):
    """Newton's method that goes on as long as its corrections shrink.

    Without Cauchy's criterion, which asks for residuals that round-off does not let a stiff field
    have, that of optimistix gives up unless the second correction is already small.
    """

    def terminate(self, *args: Any, **kwargs: Any) -> Any:
        ended, result = super().terminate(*args, **kwargs)
        # What goes on has not failed.
        return ended, RESULTS.where(jnp.asarray(ended), result, RESULTS.successful)
