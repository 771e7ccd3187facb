"""What of a profile is not reliable, and why: sentences for its first lines."""

from __future__ import annotations

from e3pruner.timing import TOLERANCE, Estimate

PARTS, PHASES, PREDICTED = 0.10, 0.05, 0.10  # how far sums may be from their whole, and predictions from measurements


def apart(name: str, parts: float, whole: float, within: float) -> list[str]:
    """A sum that is too far from the whole it should be."""
    share = parts / whole
    return [] if abs(share - 1) <= within else [f"{name}: the parts add up to {100 * share:.0f} % of the whole"]


def mispredicted(name: str, predicted: float, measured: float) -> list[str]:
    """A prediction that the measurement does not bear out."""
    ratio = predicted / measured
    return (
        [] if abs(ratio - 1) <= PREDICTED else [f"{name}: predicted {100 * (ratio - 1):+.0f} % from what was measured"]
    )


def above_ceiling(name: str, time: Estimate, limit: Estimate, share: float) -> list[str]:
    """A rate above its ceiling by more than both scatter."""
    spread = sum((e.high - e.low) / e.value if e.rounds > 2 else TOLERANCE for e in (time, limit))
    return [] if share <= 1 + spread else [f"{name} is at {100 * share:.0f} % of its ceiling, which is none then"]
