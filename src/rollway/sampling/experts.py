"""Expert solutions in a group (`rollout.experts`): a prompt's demonstration as a completion that no policy sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rollway.errors import RollwayError
from rollway.policies.tokenizers import encode_completions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPERT = "expert"
"""What `source` and the author of the segment say."""


def solution(
    prompt: dict[str, Any], prompt_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, context: int | None
) -> dict[str, Any]:
    """The demonstration of a row of `prompts`, in the columns of `rollouts` that do not name the rollout.

    Tokenised as the warm-up does, end token included; log-probs are NaN, since nobody sampled it. `context`: longest
    prompt plus completion, tokens. Raises RollwayError that names the prompt and the mend.
    """
    name = f"rollout.experts: prompt {prompt['prompt_id']}"
    text = json.loads(prompt["meta"]).get("demonstration")
    if not text:
        raise RollwayError(
            f"{name} has no demonstration; set the task's `demonstration` (or `answer`) and mend the row, or leave "
            "experts out"
        )
    tokens = encode_completions(tokenizer, [text])[0]
    count = len(tokens)
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
        raise RollwayError(
            f"{name}: the policy's tokenizer does not know all of its demonstration {text[:60]!r}; mend the row, or "
            "take a tokenizer that does"
        )
    if context is not None and len(prompt_tokens) + count > context:
        raise RollwayError(
            f"{name} and its demonstration have {len(prompt_tokens) + count} tokens, the policy's context is "
            f"{context}; shorten the demonstration, or take a policy with a longer context"
        )
    return {
        "policy": "",
        "source": EXPERT,
        "finish": "stop",
        "length": count,
        "engine": "demonstration",
        "sampling": "{}",
        "prompt_tokens": list(prompt_tokens),
        "tokens": tokens,
        "logprobs": [float("nan")] * count,
        "train_mask": [True] * count,
        "segments": [{"start": 0, "end": count, "author": EXPERT, "turn": 0}],
        "text": tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        "entropy": None,
    }
