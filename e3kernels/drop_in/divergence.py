"""The divergences as other libraries write them: one β for three of them, and no T²."""

from typing import Any


def generalised(beta: float, temperature: float) -> dict[str, Any]:
    """Our options for the generalised Jensen-Shannon divergence of `beta`: 0 the forward, 1 the reverse KL divergence.

    Raises ValueError for a `beta` outside [0, 1].
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}; must be between 0, the forward KL divergence, and 1, the reverse")
    named = "forward" if beta == 0 else "reverse" if beta == 1 else "jsd"
    return {"divergence": named, "beta": beta if named == "jsd" else 0.5, "temperature": temperature}
