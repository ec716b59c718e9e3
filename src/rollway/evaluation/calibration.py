"""How well a reward model's margins predict which completion of a pair is the chosen one."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 10


@dataclass(frozen=True)
class Bin:
    """Pairs whose confidence lies in [low, high), the last bin's in [low, high]. A mean of nothing is None."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean confidence."""
    accuracy: float | None
    """Share of them in which the chosen completion has the larger output; equal outputs count one half."""

    def row(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Calibration:
    """Of a set of pairs. A pair's confidence is sigmoid(|margin|), in [0.5, 1]."""

    accuracy: float
    log_loss: float
    """Mean of -log sigmoid(margin), nats; log 2 is what knowing nothing costs."""
    brier: float
    """Mean of (1 - sigmoid(margin))^2; 0.25 is what knowing nothing costs."""
    ece: float
    """Expected calibration error: mean |accuracy - confidence| of the bins, weighted by their counts."""
    table: list[Bin]

    def figures(self) -> dict[str, float]:
        return {"accuracy": self.accuracy, "log_loss": self.log_loss, "brier": self.brier, "ece": self.ece}


def calibration(margins: Sequence[float] | NDArray[np.float64], bins: int = BINS) -> Calibration:
    """margins [P], P >= 1: the model's output for the chosen minus that for the rejected completion, by pair.

    Expected calibration error over bins of equal width: Guo et al., arXiv 1706.04599, eq. 3.
    """
    m = np.asarray(margins, dtype=np.float64)
    right = np.where(m > 0, 1.0, np.where(m < 0, 0.0, 0.5))
    confidence = 1.0 / (1.0 + np.exp(-np.abs(m)))
    edges = np.linspace(0.5, 1.0, bins + 1)
    at = np.clip(np.searchsorted(edges, confidence, side="right") - 1, 0, bins - 1)
    table = [_bin(edges, n, confidence[at == n], right[at == n]) for n in range(bins)]
    gaps = [abs(float((right - confidence)[at == n].sum())) for n in range(bins)]
    return Calibration(
        accuracy=float(right.mean()),
        log_loss=float(np.logaddexp(0.0, -m).mean()),
        brier=float(np.exp(-2.0 * np.logaddexp(0.0, m)).mean()),
        ece=sum(gaps) / len(m),
        table=table,
    )


def _bin(edges: NDArray[np.float64], n: int, confidence: NDArray[np.float64], right: NDArray[np.float64]) -> Bin:
    low, high = round(float(edges[n]), 12), round(float(edges[n + 1]), 12)
    if not len(right):
        return Bin(low, high, 0, None, None)
    return Bin(low, high, len(right), float(confidence.mean()), float(right.mean()))
