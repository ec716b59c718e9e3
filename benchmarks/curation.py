"""Group advantage and filter over stored rollouts, against pandas and polars.

All read the same files, as rollway's stages write them: rollouts with their token columns, and one scorer's verdicts.
All drop the groups whose rewards are equal, standardise the rest within their group (GRPO) and write a narrow Parquet
file under zstd. The peers read only the columns they need, join each rollout with its one score, and check that.
Ours is what the curate stage does: checks, the round's metrics, rows in a fixed order, and the batch on disk (fsync).
The results are compared before anything is timed. With --rows above 2,000,000 only ours runs, in processes of its own.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import harness
import numpy as np

GROUP, SHARD, MEAN_TOKENS, PROMPT_TOKENS, VOCABULARY = 8, 125_000, 64, 32, 150_000
EPS = 1e-6
LARGE = 2_000_000


def main() -> int:
    options = harness.parser(__doc__)
    options.add_argument("--rows", type=int, default=1_000_000, help=f"rollouts, a multiple of {SHARD:,}")
    options.add_argument("--keep", type=Path, help="folder for the data; used again where it holds them")
    options.add_argument("--ours-once", type=Path, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    os.environ["POLARS_MAX_THREADS"] = str(chosen.threads)
    if chosen.ours_once is not None:
        return _ours_once(chosen.ours_once, chosen.threads)
    with tempfile.TemporaryDirectory(prefix="curation-") as temporary:
        folder = chosen.keep or Path(temporary)
        if not (folder / f"{chosen.rows}.json").exists():
            write_data(folder, chosen.rows)
            (folder / f"{chosen.rows}.json").write_text("{}")
        results = _large(folder, chosen) if chosen.rows > LARGE else _races(folder, chosen)
        return harness.finish(results, chosen)


def _races(folder: Path, chosen: argparse.Namespace) -> list[harness.Result]:
    import pyarrow as pa

    pa.set_cpu_count(chosen.threads)
    ours = lambda: curate(folder, chosen.threads)  # noqa: E731
    ours()
    with_pandas(folder)
    _compare(folder, "pandas")
    how, polars = fastest_polars(folder)
    peers = {"pandas": with_pandas, "polars": polars}
    bars = {"pandas": harness.at_least(3.0), "polars": harness.at_least(1.5)}
    case = f"advantage + filter, {chosen.rows:,} rollouts"
    note = "one process, warm; same files, same narrow result"
    notes = {"pandas": note, "polars": f"{note}; of polars's engines the fastest here: {how}"}
    results = [
        harness.race(
            "curation",
            case,
            ours,
            lambda peer=peer: peer(folder),
            peer_name=name,
            bar=bars[name],
            repeats=chosen.repeats,
            note=notes[name],
        )
        for name, peer in peers.items()
    ]
    results.append(
        harness.race(
            "curation",
            f"batch of pointers, not of tokens, {chosen.rows:,} rollouts",
            ours,
            lambda: rewrite_tokens(folder),
            peer_name="pandas, token columns read and written again",
            bar=harness.at_least(20.0),
            repeats=min(chosen.repeats, 3),
            warmup=0,
            note="one process; the peer's arrays are Arrow's, so no Python object is made per row",
        )
    )
    return results


def _large(folder: Path, chosen: argparse.Namespace) -> list[harness.Result]:
    """Seconds and peak memory of whole processes: start, imports and all. Polars checks the result first."""
    harness.in_child([__file__, "--ours-once", str(folder), "--threads", str(chosen.threads)])
    with_polars(folder)
    _compare(folder, "polars")
    runs = []
    for _ in range(chosen.repeats):
        start = time.perf_counter()
        said = harness.in_child([__file__, "--ours-once", str(folder), "--threads", str(chosen.threads)])
        runs.append({**json.loads(said), "process": time.perf_counter() - start})
    case = f"advantage + filter, {chosen.rows:,} rollouts, whole process"
    seconds, peak = [run["process"] for run in runs], [run["peak_gb"] for run in runs]
    if len({run["sha256"] for run in runs}) != 1:
        raise SystemExit("the batch's bytes differ from run to run")
    return [
        harness.Result("curation", case, seconds, [], "", harness.at_most(12.0)),
        harness.Result("curation", f"{case}, peak memory", peak, [], "", harness.at_most(1.0), unit="GB"),
    ]


def _ours_once(folder: Path, threads: int) -> int:
    from hashlib import sha256

    curate(folder, threads)
    digest = sha256((folder / "batch.parquet").read_bytes()).hexdigest()
    print(json.dumps({"peak_gb": _peak_bytes() / 1e9, "sha256": digest}))
    return 0


def _peak_bytes() -> int:
    """Of this process since it began; what getrusage says may be its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(next(row for row in status.read_text().splitlines() if row.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def curate(folder: Path, threads: int) -> None:
    """The curate stage on the folder's files."""
    from rollway.config.curation import CurateConfig
    from rollway.config.scorers import ScoreConfig
    from rollway.runtime.specs import CurateSpec
    from rollway.stages import curate as stage

    parts = {"filter": {"sql": "informative_groups"}, "advantage": {"sql": "grpo", "eps": EPS}}
    spec = CurateSpec(version=1, round=0, seed=0, score=ScoreConfig(), curate=CurateConfig.model_validate(parts))
    stage.run(
        spec,
        prompts=folder / "prompts.parquet",  # Not read: the SQL names nothing of a prompt.
        rollouts=rollout_files(folder),
        scores=score_files(folder),
        batch=folder / "batch.parquet",
        metrics=folder / "curate.json",
        threads=threads,
        memory=2000,
    )


def with_pandas(folder: Path) -> None:
    import pandas as pd

    def read(paths, columns):
        parts = [pd.read_parquet(p, columns=columns, engine="pyarrow", dtype_backend="pyarrow") for p in paths]
        return pd.concat(parts, ignore_index=True)

    rollouts = read(rollout_files(folder), ["rollout_id", "group_id", "round"])
    scores = read(score_files(folder), ["rollout_id", "reward"])
    rows = rollouts.merge(scores, on="rollout_id", how="left", validate="one_to_one")
    rows["reward"] = rows["reward"].to_numpy(float)
    rewards = rows.groupby("group_id", sort=False)["reward"]
    differ = rewards.transform("max") > rewards.transform("min")
    rows["advantage"] = (rows["reward"] - rewards.transform("mean")) / (rewards.transform("std") + EPS)
    kept = rows[differ]
    kept = kept.assign(slot=np.int32(0), age=0 - kept["round"], correct=kept["reward"] >= 1.0)
    kept[BATCH].to_parquet(folder / "pandas.parquet", engine="pyarrow", compression="zstd", index=False)


def with_polars(folder: Path, how: str = "streaming") -> None:
    """By its engine in memory, its streaming engine, or streamed into the file."""
    import polars as pl

    rollouts = pl.scan_parquet(rollout_files(folder)).select("rollout_id", "group_id", "round")
    scores = pl.scan_parquet(score_files(folder)).select("rollout_id", "reward")
    reward = pl.col("reward")
    rows = rollouts.join(scores, on="rollout_id", how="left", validate="1:1")
    kept = rows.filter(reward.max().over("group_id") > reward.min().over("group_id"))
    batch = kept.select(
        "rollout_id",
        slot=pl.lit(0, pl.Int32),
        advantage=(reward - reward.mean().over("group_id")) / (reward.std().over("group_id") + EPS),
        reward=reward,
        correct=reward >= 1.0,
        group_id="group_id",
        age=0 - pl.col("round"),
    )
    path = folder / "polars.parquet"
    match how:
        case "sink":
            batch.sink_parquet(path, compression="zstd")
        case "streaming":
            batch.collect(engine="streaming").write_parquet(path, compression="zstd")
        case "in memory":
            batch.collect().write_parquet(path, compression="zstd")


def fastest_polars(folder: Path) -> tuple[str, Callable[[Path], None]]:
    """Of the three ways the one that takes least here, with its name; each is compared with ours first."""
    seconds: dict[str, float] = {}
    for how in ("in memory", "streaming", "sink"):
        with_polars(folder, how)
        _compare(folder, "polars")
        seconds[how] = min(harness.cost(lambda how=how: with_polars(folder, how)) for _ in range(2))
    print("  polars: " + ", ".join(f"{how} {spent:.2f} s" for how, spent in seconds.items()))
    how = min(seconds, key=lambda how: seconds[how])
    return how, lambda folder: with_polars(folder, how)


def rewrite_tokens(folder: Path) -> None:
    """A buffer of samples: what is trained on carries its tokens along."""
    import pandas as pd

    files = zip(rollout_files(folder), score_files(folder), strict=True)
    for number, (rollouts, scores) in enumerate(files):
        wide = pd.read_parquet(rollouts, engine="pyarrow", dtype_backend="pyarrow")
        verdicts = pd.read_parquet(scores, columns=["rollout_id", "reward"], engine="pyarrow", dtype_backend="pyarrow")
        wide = wide.merge(verdicts, on="rollout_id", how="left", validate="one_to_one")
        wide["reward"] = wide["reward"].to_numpy(float)
        rewards = wide.groupby("group_id", sort=False)["reward"]
        differ = rewards.transform("max") > rewards.transform("min")
        wide["advantage"] = (wide["reward"] - rewards.transform("mean")) / (rewards.transform("std") + EPS)
        wide[differ].to_parquet(folder / f"buffer-{number:03d}.parquet", engine="pyarrow", compression="zstd")


BATCH = ["rollout_id", "slot", "advantage", "reward", "correct", "group_id", "age"]


def _compare(folder: Path, name: str) -> None:
    """The same rows, and advantages that agree to 1e-12."""
    import pyarrow.parquet as pq

    ours, theirs = (
        pq.read_table(folder / f"{which}.parquet", columns=BATCH).sort_by("rollout_id") for which in ("batch", name)
    )
    for column in ("rollout_id", "group_id"):
        if not ours.column(column).cast("large_string").equals(theirs.column(column).cast("large_string")):
            raise SystemExit(f"{name}: column {column} differs from ours")
    for column in ("advantage", "reward", "correct", "age", "slot"):
        mine, other = (table.column(column).to_numpy().astype(float) for table in (ours, theirs))
        if np.abs(mine - other).max() > 1e-12:
            raise SystemExit(f"{name}: column {column} differs by {np.abs(mine - other).max()}")


def rollout_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("rollouts-*.parquet"))


def score_files(folder: Path) -> list[Path]:
    return sorted((folder / "scores").glob("exact-*.parquet"))


def write_data(folder: Path, rows: int) -> None:
    """One round's shards by the store's own writer. Ids and rewards differ from shard to shard, tokens need not."""
    if rows % SHARD:
        raise SystemExit(f"--rows: {rows} is not a multiple of {SHARD}")
    rng = np.random.default_rng(0)
    tokens = _tokens(rng)
    for shard in range(rows // SHARD):
        _write_shard(folder, shard, tokens, rng)


def _write_shard(folder: Path, shard: int, tokens: dict, rng: np.random.Generator) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    from rollway.sampling.prompts import groups, rollout_id
    from rollway.store import parquet

    def constant(value: str | int) -> pa.Array:
        return pa.repeat(pa.scalar(value, pa.int32() if isinstance(value, int) else pa.string()), SHARD)

    first = shard * SHARD // GROUP
    names = [g.group_id for g in groups("0123456789ab", [""] * (first + SHARD // GROUP))[first:]]
    chance = rng.beta(0.5, 0.5, size=SHARD // GROUP).repeat(GROUP)
    reward = (rng.random(SHARD) < chance).astype(float)
    ids = pa.array([rollout_id(name, sample) for name in names for sample in range(GROUP)])
    of_group = pa.array(np.arange(SHARD) // GROUP)
    core = {
        "rollout_id": ids,
        "round": constant(0),
        "pass": constant(0),
        "policy": constant("0" * 64),
        "policy_round": constant(0),
        "group_id": pa.array(names).take(of_group),
        "prompt_id": pc.binary_join_element_wise("prompt", pa.array(names), "-").take(of_group),
        "sample": pa.array((np.arange(SHARD) % GROUP).astype(np.int32)),
        "source": constant("policy"),
        "finish": constant("stop"),
        "engine": constant("transformers"),
        "sampling": constant("{}"),
    }
    parquet.write(folder / f"rollouts-{shard:03d}.parquet", pa.table(core | tokens), "rollouts")
    verdicts = {
        "rollout_id": ids,
        "scorer": constant("exact"),
        "reward": pa.array(reward),
        "components": pa.array([[]] * SHARD, pa.map_(pa.string(), pa.float64())),
    }
    parquet.write(folder / "scores" / f"exact-{shard:03d}.parquet", pa.table(verdicts), "scores")


def _tokens(rng: np.random.Generator) -> dict:
    """The token payload of a shard: MEAN_TOKENS to a completion, at most 1,024."""
    import pyarrow as pa

    length = np.minimum(rng.geometric(1 / MEAN_TOKENS, size=SHARD), 1024).astype(np.int32)
    ends = np.concatenate([[0], np.cumsum(length)]).astype(np.int32)
    total = int(ends[-1])

    def by_row(values: pa.Array, starts: np.ndarray = ends) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(starts, pa.int32()), values)

    one_segment = {
        "start": pa.array(np.zeros(SHARD, np.int32)),
        "end": pa.array(length),
        "author": pa.repeat("policy", SHARD),
        "turn": pa.array(np.zeros(SHARD, np.int32)),
    }
    segments = pa.StructArray.from_arrays(list(one_segment.values()), list(one_segment))
    prompts = pa.array(rng.integers(0, VOCABULARY, size=SHARD * PROMPT_TOKENS, dtype=np.int32))
    return {
        "length": pa.array(length),
        "prompt_tokens": by_row(prompts, np.arange(SHARD + 1) * PROMPT_TOKENS),
        "tokens": by_row(pa.array(rng.integers(0, VOCABULARY, size=total, dtype=np.int32))),
        "logprobs": by_row(pa.array(-rng.exponential(size=total).astype(np.float32))),
        "train_mask": by_row(pa.array(np.ones(total, bool))),
        "segments": by_row(segments, np.arange(SHARD + 1)),
        "text": pa.array([f"answer {number} of a policy " * 8 for number in rng.integers(0, 10**9, size=SHARD)]),
    }


if __name__ == "__main__":
    sys.exit(main())
