"""evaluate: held-out prompts and a policy -> samples, verdicts, pass@k with intervals."""

import json
from pathlib import Path

import pyarrow as pa

from rollway import scorers
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import EvaluateSpec
from rollway.store import parquet
from rollway.store.atomic import write_json
from rollway.store.tables import EVALS


def run(spec: EvaluateSpec, *, prompts: Path, policy: Path, evals: Path, metrics: Path, cache: Path) -> None:
    """Samples every held-out prompt `samples` times.

    The noise depends on the prompt and not on the policy: rounds and methods are compared on common random numbers.
    """
    import torch

    from rollway import evaluation
    from rollway.config.rollouts import Sampling
    from rollway.engines import serving
    from rollway.engines.base import Request
    from rollway.policies import causal_lm

    asked = parquet.read(prompts).to_pylist()[: spec.evaluate.prompts]
    sampling = Sampling(
        temperature=spec.evaluate.temperature,
        top_p=spec.evaluate.top_p,
        top_k=spec.evaluate.top_k,
        max_tokens=spec.max_tokens,
        stop=spec.stop,
    )
    requests = []
    with serving(spec.engine, policy, "main") as served:
        reader = served.reader
        for prompt in asked:
            wording = json.loads(prompt["meta"])["format"]
            tokens = causal_lm.encode_prompt(reader, json.loads(prompt["messages"]), wording)
            requests += [Request(f"eval-{prompt['prompt_id']}-{n:04d}", tokens) for n in range(spec.evaluate.samples)]
        phases.mark("work")
        with progress(f"evaluate r{spec.round}", len(requests)):
            completions = served.draw(requests, sampling, seed=spec.seed)
    rows = []
    for number, (request, done) in enumerate(zip(requests, completions, strict=True)):
        prompt = asked[number // spec.evaluate.samples]
        rows.append(
            scorers.Row(
                rollout_id=request.rollout_id,
                prompt_id=prompt["prompt_id"],
                group_id=prompt["prompt_id"],
                sample=number % spec.evaluate.samples,
                completion=causal_lm.decode(reader, done.tokens),
                length=len(done.tokens),
                finish=done.finish,
                tokens=done.tokens,
                task=prompt["task"],
                messages=json.loads(prompt["messages"]),
                answer=prompt["answer"],
                meta=json.loads(prompt["meta"]),
            )
        )
    with progress(f"evaluate r{spec.round}: {spec.scorer_name}", len(rows)):
        verdicts = scorers.score(
            spec.scorer_name,
            spec.scorer,
            rows,
            needs={},
            threads=torch.get_num_threads(),
            root=Path.cwd(),
            cache=cache,
            trained=Path(spec.trained) if spec.trained else None,
        )
    rewards = verdicts.column("reward").to_pylist()
    table = pa.Table.from_pylist(
        [
            {
                "prompt_id": row.prompt_id,
                "sample": row.sample,
                "correct": reward >= spec.threshold,
                "reward": reward,
                "length": row.length,
                "finish": row.finish,
                "text": row.completion,
                "answer": scorers.read_answer(spec.scorer, row.completion),
                "tokens": done.tokens,
                "logprobs": done.logprobs,
            }
            for row, done, reward in zip(rows, completions, rewards, strict=True)
        ],
        schema=EVALS.schema(),
    )
    summary = evaluation.summarise(table, spec.evaluate)
    phases.mark("write")
    parquet.write(evals, table, "evals")
    write_json(metrics, {"round": spec.round, "stage": "evaluate", "metrics": summary})
    values = {row["name"]: row["value"] for row in summary}
    notice(f"round {spec.round}: held-out pass@1 {values['pass@1']:.3f}")
