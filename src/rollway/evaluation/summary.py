"""The figures of one evaluation, from its samples."""

from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rollway.config.experiment import EvaluateConfig
from rollway.errors import RollwayError
from rollway.evaluation.intervals import bootstrap_means
from rollway.evaluation.pass_at_k import avg_at_k, maj_at_k, pass_at_k, pass_auc

_READ = ("correct", "reward", "length", "finish", "answer")


def summarise(evals: pa.Table, config: EvaluateConfig) -> list[dict[str, Any]]:
    """Metrics of one evals table: pass@k, maj@k (k > 1), avg@n, reward, length (tokens), truncated (share), each a mean
    over prompts; and, with three k or more, pass_auc, the log-log area under pass@k.

    Every figure NAME comes with NAME/low and NAME/high, the ends of its bootstrap interval over prompts; `prompts` and
    `samples` are counts without an interval. Figures of second answers (`evaluate.revise`), where there are any, are
    called `revised/NAME`. Returns [{"step": 0, "name": str, "value": float}]. Raises RollwayError when the table is
    empty or a prompt has fewer samples than the largest k.
    """
    found = _summary(evals, config)
    if "revised_correct" in evals.column_names:
        seconds = {name: evals.column(f"revised_{name}") for name in _READ}
        again = _summary(pa.table({"prompt_id": evals.column("prompt_id"), **seconds}), config)
        counts = ("prompts", "samples")
        found += [figure | {"name": f"revised/{figure['name']}"} for figure in again if figure["name"] not in counts]
    return found


def _summary(evals: pa.Table, config: EvaluateConfig) -> list[dict[str, Any]]:
    if not evals.num_rows:
        raise RollwayError("evaluation: there are no samples; the held-out split is empty, or generation wrote no rows")
    figures = prompt_figures(evals, config.k)
    names = list(next(iter(figures.values())))
    values = np.array([[figures[prompt][name] for name in names] for prompt in sorted(figures)], dtype=np.float64)
    means = bootstrap_means(values, config.bootstrap)
    tails = [(1 - config.confidence) / 2, (1 + config.confidence) / 2]
    ends = np.quantile(means, tails, axis=0)
    metrics = [_metric("prompts", len(figures)), _metric("samples", evals.num_rows)]
    for column, name in enumerate(names):
        metrics += _with_ends(name, values[:, column].mean(), ends[:, column])
    ks = sorted(set(config.k))
    if len(ks) > 2:
        at = [names.index(f"pass@{k}") for k in ks]
        areas = [pass_auc(dict(zip(ks, row, strict=True))) for row in means[:, at].tolist()]
        whole = pass_auc(dict(zip(ks, values[:, at].mean(axis=0).tolist(), strict=True)))
        metrics += _with_ends("pass_auc", whole, np.quantile(areas, tails))
    return metrics


def prompt_figures(evals: pa.Table, ks: list[int]) -> dict[str, dict[str, float]]:
    """prompt_id -> figure name -> value, the units that intervals and paired comparisons draw from.

    `evals` needs prompt_id, correct, reward, length, finish, answer. Raises RollwayError that names a prompt with too
    few samples.
    """
    rows = defaultdict(list)
    for prompt_id, *row in zip(*(evals.column(name).to_pylist() for name in ("prompt_id", *_READ)), strict=True):
        rows[prompt_id].append(row)
    most = max(map(len, rows.values()))
    figures = {}
    for prompt_id, samples in rows.items():
        if len(samples) < max(ks):
            raise RollwayError(
                f"evaluation: prompt {prompt_id} has {len(samples)} samples, pass@{max(ks)} needs {max(ks)}: "
                f"raise evaluate.samples or lower evaluate.k"
            )
        correct, reward, length, finish, answer = zip(*samples, strict=True)
        figures[prompt_id] = {
            **{f"pass@{k}": pass_at_k(len(samples), sum(correct), k) for k in sorted(set(ks))},
            **{f"maj@{k}": maj_at_k(answer, correct, k) for k in sorted(set(ks)) if k > 1},
            f"avg@{most}": avg_at_k(correct),
            "reward": float(np.mean(reward)),
            "length": float(np.mean(length)),
            "truncated": sum(f == "length" for f in finish) / len(finish),
        }
    return figures


def _with_ends(name: str, value: float, ends: NDArray[np.float64]) -> list[dict[str, Any]]:
    return [_metric(name, value), _metric(f"{name}/low", ends[0]), _metric(f"{name}/high", ends[1])]


def _metric(name: str, value: float) -> dict[str, Any]:
    return {"step": 0, "name": name, "value": float(value)}
