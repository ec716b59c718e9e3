"""Figures of the distillation bench that no table of rollway has: costs by round, accuracy at equal cost, how far a
policy is from the bench's teacher, and what stored teacher scores weigh."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rollway.comparison import runs, statistics
from rollway.comparison.runs import CONFIDENCE, RESAMPLES, Contender, Outcome
from rollway.store import parquet
from rollway.store.catalog import open_catalog
from rollway.store.lineage import Inherited, inherited, read_runs
from rollway.store.tables import TEACHER_COLUMNS

Costs = dict[int, float]
"""Round -> what a run had cost when its policy of that round was there; means over seeds."""
T_97_5 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, by degrees of freedom."""


@dataclass(frozen=True)
class Mean:
    """Over seeds, with the ends of Student's 95 % interval; these are the mean where there is one seed."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Distance:
    """A policy's own held-out samples: nats per token, and tokens."""

    kl: Mean
    """KL(policy || teacher) of the next token, after what the policy wrote: mean of log-prob minus the teacher's."""
    entropy: Mean
    """Mean of -log-prob."""
    length: Mean


def mean_over_seeds(values: Sequence[float]) -> Mean:
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return Mean(mean, mean, mean)
    half = T_97_5[count - 1] * float(np.std(values, ddof=1)) / math.sqrt(count)
    return Mean(mean, mean - half, mean + half)


def student_tokens(results: Path, contenders: Sequence[Contender]) -> dict[str, Costs]:
    """Tokens that the policy itself wrote, derived rollouts among them; experts' and other models' are not its own."""
    query = """SELECT run, round, sum(length) FROM seen_rollouts
        WHERE len(list_filter(segments, lambda s: s.author = 'policy')) > 0 GROUP BY ALL"""
    with open_catalog(results) as catalog:
        found = {(run, round): float(tokens) for run, round, tokens in catalog.execute(query).fetchall()}
    return {c.name: _summed(c, lambda run, round: found.get((run, round), 0.0)) for c in contenders}


def processor_seconds(results: Path, contenders: Sequence[Contender]) -> dict[str, Costs]:
    """Of all jobs of a run's rounds (rollout, scores, checks of teachers, discriminators, curate, train), without
    warm-ups and evaluation; a fork's with the rounds that it takes whole from its parent. Processor time: jobs that run
    beside each other share the clock."""
    lineage = inherited(read_runs(results))

    def of_round(run: str, round: int) -> float:
        home = _home(lineage, run, "train", round)
        own = sorted((results / "logs" / home / f"r{round:04d}").glob("*.usage.json"))
        jobs = [path for path in own if not path.name.startswith(("evaluate", "train"))]
        jobs.append(results / "logs" / home / f"r{round + 1:04d}" / "train.usage.json")
        return sum(float(json.loads(path.read_text(encoding="utf-8"))["cpu_seconds"]) for path in jobs)

    return {c.name: _summed(c, of_round) for c in contenders}


def _home(lineage: Sequence[Inherited], run: str, stage: str, round: int) -> str:
    """The run in whose folder lies what `run` sees of a stage and round."""
    parts = [part for part in lineage if part.run == run and part.stage == stage]
    return next((part.home for part in parts if part.first_round <= round <= part.last_round), run)


def _summed(contender: Contender, of_round: Callable[[str, int], float]) -> Costs:
    names = [run.run for run in contender.runs]
    costs, total = {0: 0.0}, 0.0
    for round in range(contender.final):
        total += sum(of_round(run, round) for run in names) / len(names)
        costs[round + 1] = total
    return costs


def figures_at(contender: Contender, costs: Costs, budget: float, k: int = 1) -> NDArray[np.float64]:
    """pass@k [S, P] when `budget` is spent: between two evaluated rounds on the line through both, after the last one
    that one."""
    rounds = sorted(contender.evaluations)
    after = next((r for r in rounds if costs[r] > budget), None)
    if after is None:
        return runs.figures(contender, rounds[-1], k)
    before = max(r for r in rounds if r < after)
    share = (budget - costs[before]) / (costs[after] - costs[before])
    own = runs.figures(contender, before, k)
    return (1 - share) * own + share * runs.figures(contender, after, k)


def at_equal_cost(
    contenders: Sequence[Contender], baseline: str, costs: Mapping[str, Costs], budget: float
) -> dict[str, Outcome]:
    """pass@1 of every arm at the same cost, differences from the baseline, and verdicts corrected over the arms."""
    base = next(c for c in contenders if c.name == baseline)
    theirs = figures_at(base, costs[baseline], budget)
    found = []
    for c in contenders:
        own = figures_at(c, costs[c.name], budget)
        over = statistics.crossed_interval(own, RESAMPLES, CONFIDENCE)
        last = max(r for r in c.evaluations if costs[c.name][r] <= budget)
        known = (c.name, c.recipe, 1, len(c.seeds), last, own.shape[1], over.value, over.low, over.high)
        shared = sorted(set(c.seeds) & set(base.seeds))
        if c.name == baseline or not shared:
            found.append(Outcome(*known, verdict="baseline" if c.name == baseline else "no seed in common"))
            continue
        gaps = own[[c.seeds.index(s) for s in shared]] - theirs[[base.seeds.index(s) for s in shared]]
        means = statistics.crossed_means(gaps, RESAMPLES)
        low, high = statistics.ends(means, CONFIDENCE)
        p_seeds = statistics.seed_p(gaps.mean(axis=1))
        found.append(
            Outcome(
                *known,
                difference=float(gaps.mean()),
                difference_low=low,
                difference_high=high,
                paired_seeds=len(shared),
                p_bootstrap=statistics.bootstrap_p(means),
                p_seeds=None if math.isnan(p_seeds) else p_seeds,
            )
        )
    return {outcome.name: outcome for outcome in runs.judged(found)}


def distances(results: Path, contenders: Sequence[Contender], task: str, teacher: Path) -> dict[str, Distance]:
    """Every arm's last policies beside one teacher that reads the plain prompt, on their stored held-out samples."""
    from rollway.policies import causal_lm
    from rollway.policies.logprobs import Row, token_logprobs

    model = causal_lm.load(teacher, "main")
    asked = parquet.read(results / "tasks" / task / "heldout.parquet", ["prompt_id", "messages", "meta"]).to_pylist()
    read = {
        row["prompt_id"]: causal_lm.encode_prompt(model, json.loads(row["messages"]), json.loads(row["meta"])["format"])
        for row in asked
    }
    found = {}
    for c in contenders:
        by_seed = []
        for run in c.runs:
            evals = parquet.read(
                results / run.run / f"r{c.final:04d}" / "evals.parquet", ["prompt_id", "tokens", "logprobs", "length"]
            ).to_pylist()
            rows = [Row(read[row["prompt_id"]], row["tokens"]) for row in evals]
            said = token_logprobs(model.model, rows, temperature=1.0, micro_tokens=16384).logp.double().numpy()
            own = np.concatenate([np.array(row["logprobs"], dtype=np.float64) for row in evals])
            theirs = np.concatenate([line[: row["length"]] for line, row in zip(said, evals, strict=True)])
            by_seed.append((float((own - theirs).mean()), float(-own.mean()), len(own) / len(evals)))
        found[c.name] = Distance(*(mean_over_seeds(values) for values in zip(*by_seed, strict=True)))
    return found


def teacher_bytes(results: Path, contenders: Sequence[Contender]) -> list[tuple[str, str, int, float]]:
    """(arm, columns, tokens, bytes per token) of the teacher columns in the score files of an arm's first seed."""
    lineage, found = inherited(read_runs(results)), []
    for c in contenders:
        columns: dict[str, None] = {}
        stored = tokens = 0
        own = c.runs[0].run
        for path in sorted((results / own).glob("r*/p*/scores/*.parquet")):
            with pq.ParquetFile(path) as file:
                names = [name for name in TEACHER_COLUMNS if name in file.schema_arrow.names]
                if not names:
                    continue
                columns |= dict.fromkeys(names)
                groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            chunks = [group.column(n) for group in groups for n in range(group.num_columns)]
            stored += sum(x.total_compressed_size for x in chunks if x.path_in_schema.split(".")[0] in names)
            round, rollout_pass = path.parts[-4], path.parts[-3]
            # A fork with a scorer of its own scores its parent's rollouts anew, where they lie.
            home = _home(lineage, own, "rollout", int(round.removeprefix("r")))
            rollouts = results / home / round / rollout_pass / f"rollouts-{path.stem.rpartition('-')[2]}.parquet"
            tokens += int(sum(parquet.read(rollouts, ["length"]).column("length").to_pylist()))
        if tokens:
            found.append(
                (c.name, ", ".join(name.removeprefix("teacher_") for name in columns), tokens, stored / tokens)
            )
    return found
