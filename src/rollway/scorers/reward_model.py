"""A Hugging Face sequence-classification model with one output, in float32."""

from pathlib import Path

from rollway.config.scorers import RewardModelScorer
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies import reward_model as models
from rollway.scorers.rows import Row, Verdict


def verdicts(
    name: str, config: RewardModelScorer, rows: list[Row], threads: int, root: Path, trained: Path | None
) -> list[Verdict]:
    """The model's output for prompt and completion together, worded by its own tokenizer.

    `trained` is the reward_model.json of a model trained here; its outputs are standardised unless `normalise` is
    false.
    Rows are batched by length; a row longer than the model can read is that row's error.
    Raises RollwayError when the model cannot be loaded or changed on disk, or has more than one output, or another
    tokenizer.
    """
    import torch

    torch.set_num_threads(threads)
    who = f"scorer {name}"
    model, mean, std = _load(who, config, root, trained)
    model.model.to(causal_lm.default_device()).eval()
    encoded = [models.encode(who, model.tokenizer, r.messages, r.meta["format"], r.completion) for r in rows]
    models.check_ids(who, model, encoded)
    unreadable = {tuple(ids): reason for ids in encoded if (reason := model.unreadable(ids)) is not None}
    readable = [ids for ids in encoded if tuple(ids) not in unreadable]

    def scaled(output: float) -> float:
        return (output - mean) / std

    found = dict(zip(map(tuple, readable), models.measure(model, readable, config.batch, scaled), strict=True))
    return [
        Verdict.failed(unreadable[key]) if key in unreadable else Verdict(scaled(found[key]))
        for key in map(tuple, encoded)
    ]


def _load(
    who: str, config: RewardModelScorer, root: Path, trained: Path | None
) -> tuple[models.RewardModel, float, float]:
    """The model, and what its outputs are shifted and divided by."""
    if config.name is not None:
        local = root / config.name
        place = str(local) if local.is_dir() else config.name
        return models.load(who, place, config.name, config.revision), 0.0, 1.0
    if trained is None:
        raise RollwayError(f"{who}: the file of the reward model {config.trained} was not given")
    manifest = models.read_manifest(trained)
    model = models.load(who, str(trained.parent / models.WEIGHTS), f"{trained.parent / models.WEIGHTS}")
    if config.normalise is False:
        return model, 0.0, 1.0
    if manifest.std <= 0.0:
        raise RollwayError(
            f"{who}: {trained} records a standard deviation of 0, the model says the same of every completion; "
            f"train reward_models.{config.trained} for longer or on other pairs, or set normalise: false"
        )
    return model, manifest.mean, manifest.std
