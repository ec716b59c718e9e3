"""What a round's rollouts and batch look like in numbers. Tables come in the order of `scored`: group by group."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rollway.store.tables import TABLES

INPUT_COLUMNS = ("reward", "correct", "length", "finish", "group_id", "age", "source")
"""Columns of `scored` that the summary reads, where they exist."""


def summary(scored: pa.Table, batch: pa.Table) -> dict[str, float]:
    """Metrics of one round: of the rollouts generated in it (age 0) and of its batch (replayed rows included).

    Experts' solutions count in the batch alone, and as `experts`: nobody sampled them.

    A metric whose column is absent, or that has no rows to be taken over, is left out. Columns of `scored` that rollway
    does not know are scorers.
    """
    known = {*TABLES["rollouts"].names(), *TABLES["batch"].names(), "text_hash", "task", "answer", "meta"}
    scorers = [f.name for f in scored.schema if pa.types.is_floating(f.type) and f.name not in known]
    order = [(name, "ascending") for name in ("group_id", "sample", "rollout_id") if name in scored.column_names]
    metrics = rollout_metrics(scored.sort_by(order), scorers)
    if "source" in scored.column_names:
        place = pc.index_in(batch.column("rollout_id"), scored.column("rollout_id"))
        batch = batch.append_column("source", scored.column("source").take(place))
    return metrics | batch_metrics(batch, metrics["rollouts"])


def rollout_metrics(scored: pa.Table, scorers: list[str]) -> dict[str, float]:
    """Metrics of this round's rows."""
    mine, expert = fresh(scored), holds(scored, "source", "expert")
    sampled = mine & ~expert
    metrics: dict[str, float] = {"rollouts": float(np.count_nonzero(sampled))}
    reward, correct = _values(scored, "reward"), _values(scored, "correct")
    _add(metrics, "reward_mean", _mean(reward, sampled))
    _add(metrics, "reward_std", _std(reward, sampled))
    _add(metrics, "correct_share", _mean(correct, sampled))
    _add(metrics, "length_mean", _mean(_values(scored, "length"), sampled))
    if "finish" in scored.column_names:
        _add(metrics, "truncated_share", _mean(holds(scored, "finish", "length"), sampled))
    for name in scorers:
        _add(metrics, f"score_{name}_mean", _mean(_values(scored, name), sampled))
    if "group_id" in scored.column_names:
        groups = _GroupsOf(scored, sampled)
        metrics["groups"] = float(groups.count)
        if reward is not None:
            _add(metrics, "groups_with_signal_share", _mean(groups.highest(reward) > groups.lowest(reward)))
        if correct is not None and correct.dtype == np.bool_ and groups.count:
            every, some = groups.lowest(correct), groups.highest(correct)
            metrics["groups_all_correct"] = float(np.count_nonzero(every))
            metrics["groups_none_correct"] = float(np.count_nonzero(~some))
            metrics["groups_any_correct"] = float(np.count_nonzero(some))
    experts = mine & expert
    if experts.any():
        metrics["experts"] = float(np.count_nonzero(experts))
        _add(metrics, "expert_reward_mean", _mean(reward, experts))
    return metrics


def pool_metrics(scored: pa.Table) -> dict[str, float]:
    """Metrics of the rows that a select step chooses from, as they stand before it."""
    metrics = {"select_pool_rows": float(scored.num_rows)}
    _add(metrics, "select_pool_advantage_variance", _variance(_values(scored, "advantage")))
    return metrics


def batch_metrics(batch: pa.Table, rollouts: float) -> dict[str, float]:
    """Metrics of a batch; `rollouts` is the number generated in its round.

    batch: columns of table `batch`, and `source` where it is known.
    """
    age, reward, weight = (_values(batch, name) for name in ("age", "reward", "weight"))
    advantage = _values(batch, "advantage")
    metrics = {
        "batch_rows": float(batch.num_rows),
        "batch_rollouts": _rollouts(batch, np.ones(batch.num_rows, bool)),
        "batch_groups": float(_different(batch, "group_id")),
    }
    _add(metrics, "batch_replayed_share", None if age is None else _mean(age > 0))
    _add(metrics, "batch_reward_mean", _mean(reward))
    if reward is not None and weight is not None and weight.sum() != 0:
        metrics["batch_reward_weighted_mean"] = float((weight * reward).sum() / weight.sum())
    _add(metrics, "weight_mean", _mean(weight))
    if advantage is not None:
        _add(metrics, "advantage_mean", _mean(advantage))
        _add(metrics, "advantage_std", _std(advantage))
        _add(metrics, "advantage_variance", _variance(advantage))
        _add(metrics, "advantage_abs_mean", _mean(np.abs(advantage)))
        _add(metrics, "advantage_nonzero_share", _mean(advantage != 0))
        metrics |= _masked(batch, advantage, reward)
    if pairs := _different(batch, "pair_id"):
        metrics["pairs"] = float(pairs)
    if rollouts:
        kept = fresh(batch) & ~holds(batch, "source", "expert")
        metrics["kept_share"] = _rollouts(batch, kept) / rollouts
    if _has(batch, "route"):
        for route in pc.value_counts(batch.column("route").drop_null()).to_pylist():
            metrics[f"route_{route['values']}_share"] = route["counts"] / batch.num_rows
    return metrics


def _masked(batch: pa.Table, advantage: NDArray, reward: NDArray | None) -> dict[str, float]:
    """Of the batch's rows whose reward is above their group's mean, or below it, or that are an expert's, and of the
    groups whose rewards differ: how many have no advantage. 0 for most methods; a mask on the advantage (DaGRPO) shows
    here."""
    metrics: dict[str, float] = {}
    if not _has(batch, "group_id") or not batch.num_rows:
        return metrics
    groups = _GroupsOf(batch, np.ones(batch.num_rows, bool))
    silent = advantage == 0
    _add(metrics, "zero_advantage_expert_share", _mean(silent, holds(batch, "route", "expert")))
    if reward is None:
        return metrics
    differ = groups.highest(reward) > groups.lowest(reward)
    gap = reward - np.repeat(groups.sum(reward) / groups.sizes, groups.sizes)
    differing = np.repeat(differ, groups.sizes)
    _add(metrics, "zero_advantage_above_share", _mean(silent, differing & (gap > 0)))
    _add(metrics, "zero_advantage_below_share", _mean(silent, differing & (gap < 0)))
    _add(metrics, "zero_advantage_groups_share", _mean(groups.lowest(silent)[differ]))
    return metrics


class _GroupsOf:
    """The groups of the chosen rows of a table in which each group's rows lie together."""

    def __init__(self, table: pa.Table, chosen: NDArray[np.bool_]) -> None:
        self._rows = None if chosen.all() else np.flatnonzero(chosen)
        names = _array(table, "group_id")
        if self._rows is not None:
            names = names.take(pa.array(self._rows))
        self._starts = run_starts(names)
        self.sizes = np.diff(self._starts, append=len(names))
        self.count = len(self._starts)

    def highest(self, values: NDArray) -> NDArray:
        return np.maximum.reduceat(self._of(values), self._starts) if self.count else values[:0]

    def lowest(self, values: NDArray) -> NDArray:
        return np.minimum.reduceat(self._of(values), self._starts) if self.count else values[:0]

    def sum(self, values: NDArray) -> NDArray:
        return np.add.reduceat(self._of(values), self._starts)

    def _of(self, values: NDArray) -> NDArray:
        return values if self._rows is None else values[self._rows]


def run_starts(values: pa.Array) -> NDArray[np.int64]:
    """Where runs of equal neighbours begin. [N] without nulls -> [runs]."""
    if not len(values):
        return np.zeros(0, np.int64)
    new = pc.not_equal(values[1:], values[:-1]).to_numpy(zero_copy_only=False)
    return np.concatenate([[0], np.flatnonzero(new) + 1])


def _array(table: pa.Table, name: str) -> pa.Array:
    column = table.column(name).combine_chunks()
    return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column


def _has(table: pa.Table, name: str) -> bool:
    return name in table.column_names and table.column(name).null_count < table.num_rows


def _values(table: pa.Table, name: str) -> NDArray | None:
    """[N], NaN for single nulls; None where the column is absent or all null."""
    if name not in table.column_names or (table.num_rows and not _has(table, name)):
        return None
    if pa.types.is_null(table.column(name).type):
        return None
    return table.column(name).to_numpy()


def holds(table: pa.Table, name: str, value: str) -> NDArray[np.bool_]:
    """[N] where a column of texts holds `value`; nowhere if there is no such column."""
    if not _has(table, name):
        return np.zeros(table.num_rows, bool)
    if not pa.types.is_dictionary(table.schema.field(name).type):
        return pc.fill_null(pc.equal(table.column(name), value), False).to_numpy()
    column = _array(table, name)
    place = column.dictionary.index(value).as_py()
    return column.indices.fill_null(-1).to_numpy() == place if place >= 0 else np.zeros(table.num_rows, bool)


def fresh(table: pa.Table) -> NDArray[np.bool_]:
    """[N] rows of this round."""
    if not _has(table, "age"):
        return np.ones(table.num_rows, bool)
    age = table.column("age")
    return (age.fill_null(0) if age.null_count else age).to_numpy() == 0


def _different(table: pa.Table, name: str) -> int:
    """How many values a column has, nulls apart."""
    if not _has(table, name):
        return 0
    if name == "group_id":
        return len(run_starts(_array(table, name).drop_null()))
    return len(pc.unique(table.column(name).drop_null()))


def _rollouts(batch: pa.Table, chosen: NDArray[np.bool_]) -> float:
    """How many rollouts the chosen rows are of; repeats have slots above 0."""
    repeated = _has(batch, "slot") and (_values(batch, "slot") > 0).any()
    if not repeated:
        return float(np.count_nonzero(chosen))
    return float(len(pc.unique(batch.column("rollout_id").filter(pa.array(chosen)))))


def _add(metrics: dict[str, float], name: str, value: float | None) -> None:
    if value is not None:
        metrics[name] = value


def _chosen(values: NDArray | None, chosen: NDArray[np.bool_] | None) -> NDArray | None:
    """Without nulls."""
    if values is None:
        return None
    if chosen is not None and not chosen.all():
        values = values[chosen]
    if values.dtype == object:  # Truth values among which are nulls.
        return np.array([value for value in values if value is not None], np.float64)
    return values[~np.isnan(values)] if values.dtype.kind == "f" and np.isnan(values).any() else values


def _mean(values: NDArray | None, chosen: NDArray[np.bool_] | None = None) -> float | None:
    found = _chosen(values, chosen)
    if found is None or not len(found):
        return None
    return float(np.count_nonzero(found) / len(found)) if found.dtype == np.bool_ else float(found.mean())


def _std(values: NDArray | None, chosen: NDArray[np.bool_] | None = None) -> float | None:
    found = _chosen(values, chosen)
    return None if found is None or len(found) < 2 else float(found.std(ddof=1))


def _variance(values: NDArray | None) -> float | None:
    found = _chosen(values, None)
    return None if found is None or not len(found) else float(found.var())
