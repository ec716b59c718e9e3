"""warmup: a base policy, taught the task's demonstrations, or as it is -> the policy of round 0."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rollway.config.policies import PrivilegedSft
from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import WarmupSpec
from rollway.stages.refused import told_of
from rollway.store import parquet, provenance
from rollway.store.atomic import write_json

if TYPE_CHECKING:
    from rollway.policies.causal_lm import CausalPolicy
    from rollway.training.sft import Demonstration

_COMPLETION = 3
"""Of the seeds, beside those of `training/sft.py`: mistakes in the answers that contexts show."""


def run(spec: WarmupSpec, *, prompts: list[Path], policy: Path) -> None:
    """Writes policy.json last, when weights and metrics are in place. Where a step must not be taken its demonstrations
    go into `failed/warmup.json`."""
    from rollway.policies import causal_lm, manifest
    from rollway.training.sft import Demonstration, sft

    asked = parquet.read_many(prompts).to_pylist() if prompts else []
    worded = [(row, json.loads(row["messages"]), json.loads(row["meta"])) for row in asked]
    texts = [m["content"] for _, messages, _ in worded for m in messages] + [d["demonstration"] for *_, d in worded]
    privileged = None if spec.warmup.sft is None else spec.warmup.sft.privileged
    if privileged is not None:
        # A bpe tokenizer shall know the words of the contexts as it knows those of the prompts.
        texts += [context.templates for context in privileged.context] * len(asked)
    built = causal_lm.build(spec.warmup.policy, texts, spec.seed)
    if spec.warmup.sft is not None:
        if built.adapter is None:
            built.model.requires_grad_(True)
        demonstrations = [
            Demonstration(
                row["prompt_id"], causal_lm.encode_prompt(built, messages, meta["format"]), meta["demonstration"]
            )
            for row, messages, meta in worded
        ]
        if privileged is not None:
            demonstrations += told(privileged, worded, built, spec.seed)
        phases.mark("work")
        with told_of(policy, "warmup", 0), progress("warm-up", spec.warmup.sft.steps) as advance:
            metrics = sft(
                built.model,
                built.tokenizer,
                demonstrations,
                spec.warmup.sft,
                seed=spec.seed,
                context=causal_lm.context_length(built.model),
                progress=advance,
            )
        rows = [metric.row() for metric in metrics]
        write_json(
            policy.parent / "metrics.json", {"round": 0, "stage": "warmup", "metrics": rows, **provenance.said()}
        )
        notice(f"warm-up: loss {metrics[-3].value:.4f} nats per token after {spec.warmup.sft.steps} steps")
    phases.mark("write")
    main = causal_lm.save(policy.parent, built, trained=spec.warmup.sft is not None)
    manifest.write_manifest(policy, manifest.PolicyManifest("causal-lm", {"main": main}))


def told(
    privileged: PrivilegedSft,
    asked: list[tuple[dict[str, Any], list[dict[str, str]], dict[str, Any]]],
    built: "CausalPolicy",
    seed: int,
) -> "list[Demonstration]":
    """Demonstrations after a teacher's context: as many as make up the share, prompts and contexts taking turns.

    asked: row of the prompts table, messages and meta of each prompt. Raises RollwayError where a context names what a
    prompt does not have.
    """
    from rollway.policies import causal_lm
    from rollway.scorers.contexts import Private, worded
    from rollway.scorers.rows import Row
    from rollway.training.sft import Demonstration, corrupt, letters

    reader, found = causal_lm.reader_of(built), []
    alphabet = letters(meta["demonstration"] for *_, meta in asked)
    for number in range(round(len(asked) * privileged.share / (1.0 - privileged.share))):
        prompt, messages, meta = asked[number % len(asked)]
        solution = meta["demonstration"]
        looked_at = corrupt(solution, alphabet, privileged.noise, np.random.default_rng([seed, _COMPLETION, number]))
        tokens = built.tokenizer(looked_at, add_special_tokens=False)["input_ids"]
        row = Row(
            **{"rollout_id": "", "prompt_id": prompt["prompt_id"], "group_id": "", "sample": 0, "finish": ""},
            **{"completion": looked_at, "tokens": tokens, "length": len(tokens), "task": prompt["task"]},
            **{"messages": messages, "answer": prompt["answer"], "meta": meta},
        )
        context = privileged.context[number % len(privileged.context)]
        try:
            plain = causal_lm.encode_prompt(built, messages, meta["format"])
            private = Private(solution, solution, looked_at == solution, {})
            read = worded([context], row, private, reader, plain)
        except RollwayError as error:
            raise RollwayError(f"warm-up: sft.privileged.context, prompt {row.prompt_id}: {error}") from None
        assert read is not None
        found.append(Demonstration(row.prompt_id, read[1], solution, noisy=False))
    return found
