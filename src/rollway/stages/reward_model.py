"""reward_model: preference pairs and a base model -> a reward model, and how well it ranks pairs it never saw."""

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc

from rollway import curation
from rollway.config.reward_models import FilePairs, HuggingFaceBase, WarmupBase
from rollway.errors import RollwayError
from rollway.evaluation.calibration import Calibration, calibration
from rollway.runtime.notice import notice, progress
from rollway.runtime.paths import by_round, by_scorer
from rollway.runtime.specs import RewardModelSpec
from rollway.stages.refused import told_of
from rollway.store import parquet, provenance
from rollway.store.atomic import write_json
from rollway.tasks.entries import read_entries
from rollway.training import pairs as preference
from rollway.training.pairs import Pair


def run(
    spec: RewardModelSpec,
    *,
    prompts: list[Path],
    rollouts: list[Path],
    scores: list[Path],
    policy: list[Path],
    reward_model: Path,
    metrics: Path,
) -> None:
    """Writes weights and metrics and, last, reward_model.json. prompts, rollouts, scores: for pairs of a run; policy:
    for a base that is a warm-up. Where a step must not be taken its pairs go into `failed/reward_model.json`."""
    from rollway.policies import causal_lm
    from rollway.policies import reward_model as models
    from rollway.training import reward_model as training

    config, who = spec.config, f"reward_models.{reward_model.parent.name}"
    given, left_out = _pairs(spec, who, prompts, rollouts, scores)
    match config.base:
        case WarmupBase():
            model = models.from_policy(who, causal_lm.load(policy[0], "main"), config.seed)
        case HuggingFaceBase(name=name, revision=revision, dtype=dtype):
            model = models.from_pretrained(who, name, revision, dtype, config.seed)
            model.model.to(causal_lm.default_device())
    taught, heldout = preference.deal(given, config.heldout_share)
    taught, flipped = preference.swapped(taught, config.flip)
    learnt, not_learnt = training.encoded(who, model, taught)
    unseen, not_seen = training.encoded(who, model, heldout)
    skipped = left_out + not_learnt + not_seen
    if not learnt or not unseen:
        raise RollwayError(
            f"{who}: of {len(given) + left_out.total()} pairs, {len(learnt)} are left to learn and {len(unseen)} to "
            f"hold out ({_reasons(skipped)}); give more pairs, or a base that reads longer rows"
        )

    steps = training.updates(len(learnt), config)
    with told_of(reward_model, "reward_model", None), progress("reward model", steps) as advance:
        measured = training.train(who, model, learnt, config, advance)
    scorer = models.in_float32(model)  # what is measured is what scorers will see
    mean, std = training.moments(who, scorer, learnt)
    on = {
        "heldout": calibration(training.margins(who, scorer, unseen)),
        "train": calibration(training.margins(who, scorer, learnt)),
    }
    files = models.save(reward_model.parent, model)
    counts = {"train": len(learnt), "heldout": len(unseen), "flipped": flipped, "skipped": sum(skipped.values())}
    report = _report([metric.row() for metric in measured], steps, on, counts, dict(skipped))
    write_json(metrics, report | provenance.said())
    models.write_manifest(reward_model, models.RewardModelManifest(files, mean, std))
    notice(
        f"{who}: {len(learnt)} pairs learnt; of {len(unseen)} held-out pairs {on['heldout'].accuracy:.3f} right, "
        f"log loss {on['heldout'].log_loss:.3f}, calibration error {on['heldout'].ece:.3f}"
    )


def _pairs(
    spec: RewardModelSpec, who: str, prompts: list[Path], rollouts: list[Path], scores: list[Path]
) -> tuple[list[Pair], Counter[str]]:
    """The pairs, and how many of a run are none, by reason."""
    source = spec.config.pairs
    if isinstance(source, FilePairs):
        return preference.from_entries(read_entries(source.source, Path.cwd()), source), Counter()
    asked = parquet.read_many(prompts, ["prompt_id", "messages", "meta"])
    written, judged = by_round(rollouts), by_round(scores)
    pairs: list[Pair] = []
    skipped = Counter[str]()
    for part in spec.rounds:
        judgements = by_scorer(judged[part.round])
        curated = curation.curate_files(
            written[part.round],
            judgements,
            part.score,
            part.curate,
            round=part.round,
            prompts=prompts,
            given=curation.given_values(part.curate, round=part.round, seed=source.seed),
        )
        texts = parquet.read_many(written[part.round], ["rollout_id", "prompt_id", "text"])
        errors = parquet.read_many([path for paths in judgements.values() for path in paths], ["rollout_id", "error"])
        failed = set(errors.filter(pc.is_valid(errors.column("error"))).column("rollout_id").to_pylist())
        found, left_out = preference.from_batch(
            curated.batch, texts, asked, failed=failed, by_reward=curation.reads_reward(source.pair)
        )
        pairs, skipped = pairs + found, skipped + left_out
    if not pairs:
        none = f" ({_reasons(skipped)})" if skipped else ""
        raise RollwayError(
            f"{who}: {source.pair.sql} makes no pair of the rollouts of rounds {source.rounds} of run {source.run}"
            f"{none}; name more rounds, another pair file, or a `reward` in which the rollouts of a group differ"
        )
    return pairs, skipped


def _reasons(skipped: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(skipped.items()))


def _report(
    rows: list[dict[str, object]],
    step: int,
    on: dict[str, Calibration],
    counts: dict[str, int],
    skipped: dict[str, int],
) -> dict[str, object]:
    """metrics.json: figures as rows of `metrics`, as every stage has them; the reliability tables beside them."""
    figures = {f"pairs_{name}": float(count) for name, count in counts.items()}
    figures |= {f"{side}_{name}": value for side, found in on.items() for name, value in found.figures().items()}
    rows = rows + [{"step": step, "name": name, "value": value} for name, value in figures.items()]
    reliability = {side: [b.row() for b in found.table] for side, found in on.items()}
    return {
        "round": None,
        "stage": "reward_model",
        "metrics": rows,
        "reliability": reliability,
        "skipped": skipped,
    }
