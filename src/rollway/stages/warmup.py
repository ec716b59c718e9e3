"""warmup: a base policy, taught the task's demonstrations, or as it is -> the policy of round 0."""

import json
from pathlib import Path

from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import WarmupSpec
from rollway.store import parquet
from rollway.store.atomic import write_json


def run(spec: WarmupSpec, *, prompts: list[Path], policy: Path) -> None:
    """Writes policy.json last, when weights and metrics are in place."""
    from rollway.policies import causal_lm, manifest
    from rollway.training.sft import Demonstration, sft

    asked = parquet.read_many(prompts).to_pylist() if prompts else []
    worded = [(row, json.loads(row["messages"]), json.loads(row["meta"])) for row in asked]
    texts = [m["content"] for _, messages, _ in worded for m in messages] + [d["demonstration"] for *_, d in worded]
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
        phases.mark("work")
        with progress("warm-up", spec.warmup.sft.steps) as advance:
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
        write_json(policy.parent / "metrics.json", {"round": 0, "stage": "warmup", "metrics": rows})
        notice(f"warm-up: loss {metrics[-3].value:.4f} nats per token after {spec.warmup.sft.steps} steps")
    phases.mark("write")
    main = causal_lm.save(policy.parent, built, trained=spec.warmup.sft is not None)
    manifest.write_manifest(policy, manifest.PolicyManifest("causal-lm", {"main": main}))
