"""How much likelier each token of a rollout became by the round's training."""

import math
from pathlib import Path
from typing import Any

from rollway.comparison import stored as files
from rollway.errors import RollwayError


def token_ratios(results: Path, run: str, row: dict[str, Any]) -> list[float]:
    """exp(log-prob under the policy one round on - the stored log-prob) of every token [T]; NaN where none is stored.

    row: of `rollouts`. Both at the temperature at which the run sampled; a truncated distribution (top_p, top_k) is not
    renormalised, as in training, and of a mixture with a teacher the stored log-prob is the mixture's, as a correction
    takes it. Raises RollwayError where that policy's weights are not there.
    """
    from rollway.policies import causal_lm
    from rollway.policies.logprobs import Row, token_logprobs

    stored = files.open_round(results, run, row["round"])
    path = stored.policy(row["round"] + 1)
    if not path.exists():
        raise RollwayError(
            f"show: {path} is not there, so ratios are not known: the round is not trained yet, or the folder holds "
            "tables alone"
        )
    if not row["prompt_tokens"] or not row["tokens"]:
        raise RollwayError("show: no tokens are stored of this rollout, so ratios are not known")
    temperature = float(stored.rollout_settings().get("sampling", {}).get("temperature", 1.0))
    model = causal_lm.load(path, "main").model
    after = token_logprobs(
        model, [Row(row["prompt_tokens"], row["tokens"])], temperature=temperature, micro_tokens=16_384
    ).logp[0]
    before = row["logprobs"] or [math.nan] * len(row["tokens"])
    return [math.exp(a - b) for a, b in zip(after.tolist(), before, strict=True)]
