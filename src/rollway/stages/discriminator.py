"""discriminator: a round's rollouts and a teacher's text -> a reward model that tells them apart (GAD)."""

import json
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa

from rollway.errors import RollwayError
from rollway.evaluation.calibration import calibration
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import DiscriminatorSpec
from rollway.scorers.contexts import references as told_in
from rollway.stages.refused import told_of
from rollway.store import parquet, provenance
from rollway.store.atomic import write_json
from rollway.training import pairs as preference


def run(
    spec: DiscriminatorSpec,
    *,
    prompts: Path,
    rollouts: list[Path],
    references: list[Path],
    previous: list[Path],
    policy: list[Path],
    reward_model: Path,
    metrics: Path,
) -> None:
    """Writes weights and metrics and, last, reward_model.json. references: files of the teacher's text; none: the
    prompts' demonstrations. previous: the model of the round before, which this one goes on from; none: the policy
    under a new head. Where a step must not be taken its pairs go into `failed/discriminator.json`."""
    from rollway.policies import causal_lm
    from rollway.policies import reward_model as models
    from rollway.training import reward_model as training

    who, config = f"score.scorers.{spec.scorer}", spec.config
    asked = parquet.read(prompts, ["prompt_id", "messages", "meta"])
    told = told_in(who, references) if references else _demonstrations(asked)
    written = parquet.read_many(rollouts, ["rollout_id", "prompt_id", "source", "text"])
    given, skipped = preference.against_teacher(written, asked, told)
    if not given:
        raise RollwayError(
            f"{who}: no rollout of round {spec.round} answers a prompt that the teacher answered too; give the task a "
            "`demonstration`, or the scorer `references` of the same prompts"
        )
    # What no other round draws, and no other run.
    seed = int.from_bytes(blake2b(f"{spec.seed}/{config.training.seed}/{spec.round}".encode(), digest_size=4).digest())
    settings = config.training.model_copy(update={"seed": seed})
    if previous:
        models.read_manifest(previous[0])
        model = models.load(who, str(previous[0].parent / models.WEIGHTS), str(previous[0].parent / models.WEIGHTS))
        model.model.to(causal_lm.default_device())
    else:
        model = models.from_policy(who, causal_lm.load(policy[0], "main"), seed)
    taught, heldout = preference.deal(given, config.heldout_share)
    (learnt, not_learnt), (unseen, not_seen) = (training.encoded(who, model, part) for part in (taught, heldout))
    skipped = skipped + not_learnt + not_seen

    phases.mark("work")
    before = training.margins(who, model, unseen)
    steps = training.updates(len(learnt), settings)
    rows = []
    if learnt:
        refused = told_of(reward_model, "discriminator", spec.round)
        with refused, progress(f"discriminator r{spec.round}", steps) as advance:
            rows = [m.row() for m in training.train(who, model, learnt, settings, advance)]
    else:
        notice(f"{who}: no pair differs, so nothing is learnt: the policy writes what the teacher does")
    scorer = models.in_float32(model)
    mean, std = training.moments(who, scorer, learnt) if learnt else (0.0, 0.0)
    figures = {"pairs_train": len(learnt), "pairs_heldout": len(unseen), "pairs_skipped": sum(skipped.values())}
    found = {f"{spec.scorer}/{name}": float(count) for name, count in figures.items()}
    for side, margins in (("before", before), ("heldout", training.margins(who, scorer, unseen))):
        if margins:
            found |= {f"{spec.scorer}/{side}_{name}": x for name, x in calibration(margins).figures().items()}

    phases.mark("write")
    rows = [{**row, "name": f"{spec.scorer}/{row['name']}"} for row in rows]
    rows += [{"step": steps, "name": name, "value": value} for name, value in found.items()]
    files = models.save(reward_model.parent, model)
    report = {
        "round": spec.round,
        "stage": "discriminator",
        "metrics": rows,
        "skipped": dict(skipped),
        **provenance.said(),
    }
    write_json(metrics, report)
    models.write_manifest(reward_model, models.RewardModelManifest(files, mean, std))
    right = found.get(f"{spec.scorer}/heldout_accuracy")
    shown = "" if right is None else f"; of {len(unseen)} held-out pairs {right:.3f} right"
    notice(f"{who}: round {spec.round}: {len(learnt)} pairs learnt{shown}")


def _demonstrations(asked: pa.Table) -> dict[str, str]:
    """The task's own solutions by prompt."""
    meta = zip(asked["prompt_id"].to_pylist(), map(json.loads, asked["meta"].to_pylist()), strict=True)
    return {prompt_id: values["demonstration"] for prompt_id, values in meta if values.get("demonstration")}
