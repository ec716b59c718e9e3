"""What a round's rollouts and batch look like in numbers. Tables come in the order of `scored`: group by group.

Each figure is made of counts and sums, which are taken of tables of whole groups and added: `Tally`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rollway.store.tables import TABLES

DERIVED_FROM = "parent_id"
"""Column of `scored` that, with `pass`, tells derived rollouts: those of a later pass that have a parent."""
INPUT_COLUMNS = ("reward", "correct", "length", "finish", "group_id", "age", "source")
"""Columns of `scored` that the summary reads, where they exist."""


@dataclass(frozen=True)
class Sums:
    """Of values: how many, their sum, and the sum of their squared differences from the mean."""

    count: int
    total: float
    squares: float = 0.0

    def __add__(self, other: Self) -> "Sums":
        """Of both (Chan, Golub and LeVeque 1983)."""
        if not self.count or not other.count:
            return self if self.count else other
        gap = other.total / other.count - self.total / self.count
        between = gap * gap * self.count * other.count / (self.count + other.count)
        return Sums(self.count + other.count, self.total + other.total, self.squares + other.squares + between)


@dataclass
class Tally:
    """Counts and sums by figure. A figure that has no rows to be taken over is not in it."""

    counts: dict[str, float] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    def count(self, name: str, value: float | np.integer) -> None:
        self.counts[name] = self.counts.get(name, 0.0) + float(value)

    def mean(self, name: str, values: NDArray | None, chosen: NDArray[np.bool_] | None = None) -> None:
        found = _chosen(values, chosen)
        if found is not None and len(found):
            self.sums[name] = Sums(len(found), float(np.count_nonzero(found) if found.dtype == bool else found.sum()))

    def spread(self, names: Iterable[str], values: NDArray | None, chosen: NDArray[np.bool_] | None = None) -> None:
        """names: end in _mean, _std (ddof 1) or _variance (ddof 0)."""
        found = _chosen(values, chosen)
        if found is not None and len(found):
            apart = found - found.mean()
            sums = Sums(len(found), float(found.sum()), float(np.square(apart).sum()))
            self.sums |= dict.fromkeys(names, sums)

    def __add__(self, other: Self) -> "Tally":
        both = Tally(dict(self.counts), dict(self.sums))
        for name, value in other.counts.items():
            both.count(name, value)
        for name, sums in other.sums.items():
            both.sums[name] = both.sums[name] + sums if name in both.sums else sums
        return both

    def figures(self) -> dict[str, float]:
        found = dict(self.counts)
        for name, sums in self.sums.items():
            if name.endswith("_std"):
                if sums.count > 1:
                    found[name] = float(np.sqrt(sums.squares / (sums.count - 1)))
            elif name.endswith("_variance"):
                found[name] = sums.squares / sums.count
            else:
                found[name] = sums.total / sums.count
        return found


def added(tallies: Iterable[Tally]) -> Tally:
    """In their order, which decides the last bit."""
    total = Tally()
    for tally in tallies:
        total = total + tally
    return total


def summary(scored: pa.Table, batch: pa.Table) -> dict[str, float]:
    """Metrics of one round: of the rollouts generated in it (age 0) and of its batch (replayed rows included).

    Experts' solutions count in the batch alone, and as `experts`: nobody sampled them. Derived rollouts count in the
    batch and as `derived_{source}_...`.

    A metric whose column is absent, or that has no rows to be taken over, is left out. Columns of `scored` that rollway
    does not know are scorers.
    """
    known = {*TABLES["rollouts"].names(), *TABLES["batch"].names(), "text_hash", "task", "answer", "meta"}
    scorers = [f.name for f in scored.schema if pa.types.is_floating(f.type) and f.name not in known]
    order = [(name, "ascending") for name in ("group_id", "sample", "rollout_id") if name in scored.column_names]
    if "source" in scored.column_names:
        place = pc.index_in(batch.column("rollout_id"), scored.column("rollout_id"))
        for name in ("source", "pass", DERIVED_FROM):
            if name in scored.column_names:
                batch = batch.append_column(name, scored.column(name).take(place))
    metrics = of_rollouts(scored.sort_by(order), scorers).figures()
    return metrics | batch_figures(of_batch(batch), metrics["rollouts"])


def of_rollouts(scored: pa.Table, scorers: list[str]) -> Tally:
    """Of this round's rows."""
    tally = Tally()
    mine, expert, made = fresh(scored), holds(scored, "source", "expert"), derived(scored)
    sampled = mine & ~expert & ~made
    tally.count("rollouts", np.count_nonzero(sampled))
    reward, correct = _values(scored, "reward"), _values(scored, "correct")
    tally.spread(("reward_mean", "reward_std"), reward, sampled)
    tally.mean("correct_share", correct, sampled)
    tally.mean("length_mean", _values(scored, "length"), sampled)
    if "finish" in scored.column_names:
        tally.mean("truncated_share", holds(scored, "finish", "length"), sampled)
    for name in scorers:
        tally.mean(f"score_{name}_mean", _values(scored, name), sampled)
    if "group_id" in scored.column_names:
        groups = _GroupsOf(scored, sampled)
        tally.count("groups", groups.count)
        if reward is not None:
            tally.mean("groups_with_signal_share", groups.highest(reward) > groups.lowest(reward))
        if correct is not None and correct.dtype == np.bool_ and groups.count:
            every, some = groups.lowest(correct), groups.highest(correct)
            tally.count("groups_all_correct", np.count_nonzero(every))
            tally.count("groups_none_correct", np.count_nonzero(~some))
            tally.count("groups_any_correct", np.count_nonzero(some))
    experts = mine & expert
    if experts.any():
        tally.count("experts", np.count_nonzero(experts))
        tally.mean("expert_reward_mean", reward, experts)
    for name in _sources(scored, mine & made):
        own = mine & made & holds(scored, "source", name)
        tally.count(f"derived_{name}_rollouts", np.count_nonzero(own))
        tally.mean(f"derived_{name}_reward_mean", reward, own)
        tally.mean(f"derived_{name}_correct_share", correct, own)
        tally.mean(f"derived_{name}_length_mean", _values(scored, "length"), own)
    return tally


def of_pool(scored: pa.Table) -> Tally:
    """Of the rows that a select step chooses from, as they stand before it."""
    tally = Tally()
    tally.count("select_pool_rows", scored.num_rows)
    tally.spread(("select_pool_advantage_variance",), _values(scored, "advantage"))
    return tally


def of_batch(batch: pa.Table) -> Tally:
    """Of a batch, for `batch_figures`. batch: columns of table `batch`, and `source` where it is known."""
    tally = Tally()
    age, reward, weight = (_values(batch, name) for name in ("age", "reward", "weight"))
    advantage = _values(batch, "advantage")
    tally.count("batch_rows", batch.num_rows)
    tally.count("batch_rollouts", _rollouts(batch, np.ones(batch.num_rows, bool)))
    tally.count("batch_groups", _different(batch, "group_id"))
    tally.mean("batch_replayed_share", None if age is None else age > 0)
    tally.mean("batch_reward_mean", reward)
    tally.mean("weight_mean", weight)
    if reward is not None and weight is not None:
        tally.count(_WEIGHT, weight.sum())
        tally.count(_WEIGHTED, (weight * reward).sum())
    if advantage is not None:
        tally.spread(("advantage_mean", "advantage_std", "advantage_variance"), advantage)
        tally.mean("advantage_abs_mean", np.abs(advantage))
        tally.mean("advantage_nonzero_share", advantage != 0)
        _masked(tally, batch, advantage, reward)
    if pairs := _different(batch, "pair_id"):
        tally.count("pairs", pairs)
    tally.count(_KEPT, _rollouts(batch, fresh(batch) & ~holds(batch, "source", "expert") & ~derived(batch)))
    if _has(batch, "route"):
        for route in pc.value_counts(batch.column("route").drop_null()).to_pylist():
            tally.count(f"{_ROUTE}{route['values']}", route["counts"])
        _weight_entropies(tally, batch, weight)
    return tally


_WEIGHT, _WEIGHTED, _KEPT, _ROUTE = "sum of weights", "sum of weighted rewards", "kept", "route "


def batch_figures(tally: Tally, rollouts: float) -> dict[str, float]:
    """Metrics of a batch; `rollouts` is the number generated in its round."""
    counts = tally.counts
    found = Tally({n: v for n, v in counts.items() if n in _BATCH_COUNTS}, tally.sums).figures()
    if counts.get(_WEIGHT):
        found["batch_reward_weighted_mean"] = counts[_WEIGHTED] / counts[_WEIGHT]
    if rollouts:
        found["kept_share"] = counts[_KEPT] / rollouts
    routes = {n.removeprefix(_ROUTE): v for n, v in counts.items() if n.startswith(_ROUTE)}
    return found | {f"route_{name}_share": count / counts["batch_rows"] for name, count in routes.items()}


_BATCH_COUNTS = ("batch_rows", "batch_rollouts", "batch_groups", "pairs")


def _weight_entropies(tally: Tally, batch: pa.Table, weight: NDArray | None) -> None:
    """Of each route `route_{name}_weight_entropy`: the mean over groups of the entropy, in nats, of the weights of a
    group's rows of that route, made to sum to 1. ln n: n rows count alike; 0: one of them alone counts."""
    if weight is None or not _has(batch, "group_id"):
        return
    for name in pc.unique(batch.column("route").drop_null()).to_pylist():
        chosen = holds(batch, "route", name) & (weight > 0)
        groups = _GroupsOf(batch, chosen)
        if groups.count:
            share = np.zeros(len(weight))
            share[chosen] = weight[chosen] / np.repeat(groups.sum(weight), groups.sizes)
            entropy = groups.sum(-share * np.log(np.where(share > 0, share, 1.0)))
            tally.mean(f"route_{name}_weight_entropy", entropy)


def _masked(tally: Tally, batch: pa.Table, advantage: NDArray, reward: NDArray | None) -> None:
    """Of the batch's rows whose reward is above their group's mean, or below it, or that are an expert's, and of the
    groups whose rewards differ: how many have no advantage. 0 for most methods; a mask on the advantage (DaGRPO) shows
    here."""
    if not _has(batch, "group_id") or not batch.num_rows:
        return
    groups = _GroupsOf(batch, np.ones(batch.num_rows, bool))
    silent = advantage == 0
    tally.mean("zero_advantage_expert_share", silent, holds(batch, "route", "expert"))
    if reward is None:
        return
    differ = groups.highest(reward) > groups.lowest(reward)
    gap = reward - np.repeat(groups.sum(reward) / groups.sizes, groups.sizes)
    differing = np.repeat(differ, groups.sizes)
    tally.mean("zero_advantage_above_share", silent, differing & (gap > 0))
    tally.mean("zero_advantage_below_share", silent, differing & (gap < 0))
    tally.mean("zero_advantage_groups_share", groups.lowest(silent)[differ])


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


def derived(table: pa.Table) -> NDArray[np.bool_]:
    """[N] rows made of rollouts of the round's earlier passes; none where the columns are not there."""
    if not _has(table, DERIVED_FROM) or not _has(table, "pass"):
        return np.zeros(table.num_rows, bool)
    return (table.column("pass").to_numpy() > 0) & table.column(DERIVED_FROM).is_valid().to_numpy()


def _sources(table: pa.Table, chosen: NDArray[np.bool_]) -> list[str]:
    """Different sources of the chosen rows."""
    if not chosen.any():
        return []
    return sorted(pc.unique(table.column("source").filter(pa.array(chosen))).to_pylist())


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
    slot = _values(batch, "slot")
    if slot is None or not (slot > 0).any():
        return float(np.count_nonzero(chosen))
    return float(len(pc.unique(batch.column("rollout_id").filter(pa.array(chosen)))))


def _chosen(values: NDArray | None, chosen: NDArray[np.bool_] | None) -> NDArray | None:
    """Without nulls."""
    if values is None:
        return None
    if chosen is not None and not chosen.all():
        values = values[chosen]
    if values.dtype == object:  # Truth values among which are nulls.
        return np.array([value for value in values if value is not None], np.float64)
    return values[~np.isnan(values)] if values.dtype.kind == "f" and np.isnan(values).any() else values
