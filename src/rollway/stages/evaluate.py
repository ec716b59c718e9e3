"""evaluate: held-out prompts and a policy -> samples, verdicts, pass@k with intervals; and what revising them gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rollway import scorers
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.specs import EvaluateSpec
from rollway.store import parquet
from rollway.store.atomic import write_json
from rollway.store.tables import EVALS

if TYPE_CHECKING:
    from rollway.engines.base import Completion, Request
    from rollway.policies.causal_lm import Reader


def run(spec: EvaluateSpec, *, prompts: Path, policy: Path, evals: Path, metrics: Path, cache: Path) -> None:
    """Samples every held-out prompt `samples` times.

    The noise depends on the prompt and not on the policy: rounds and methods are compared on common random numbers.
    """
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
    columns: list[dict[str, Any]] | None = None
    revised: list[dict[str, Any]] = []
    with serving(spec.engine, policy, "main") as served:
        reader = served.reader
        for prompt in asked:
            wording = json.loads(prompt["meta"])["format"]
            tokens = causal_lm.encode_prompt(reader, json.loads(prompt["messages"]), wording)
            requests += [Request(f"eval-{prompt['prompt_id']}-{n:04d}", tokens) for n in range(spec.evaluate.samples)]
        phases.mark("work")
        with progress(f"evaluate r{spec.round}", len(requests)):
            completions = served.draw(requests, sampling, seed=spec.seed)
        if spec.evaluate.revise is not None:
            rows = _rows(spec, asked, requests, completions, reader)
            columns = _judged(spec, rows, completions, cache)
            again = _revisions(spec, rows, columns, requests, reader)
            with progress(f"evaluate r{spec.round}: revisions", len(again)):
                seconds = served.draw(again, sampling, seed=spec.seed)
            judged = _judged(spec, _rows(spec, asked, again, seconds, reader), seconds, cache)
            revised = [row | {"prompt_tokens": a.prompt_tokens} for row, a in zip(judged, again, strict=True)]
    if columns is None:
        columns = _judged(spec, _rows(spec, asked, requests, completions, reader), completions, cache)
    if revised:
        kept = [name.removeprefix("revised_") for name in _REVISED]
        columns = [
            row | {f"revised_{name}": second[name] for name in kept}
            for row, second in zip(columns, revised, strict=True)
        ]
    table = pa.Table.from_pylist(columns, schema=EVALS.schema(_REVISED if revised else ()))
    summary = evaluation.summarise(table, spec.evaluate)
    phases.mark("write")
    parquet.write(evals, table, "evals")
    write_json(metrics, {"round": spec.round, "stage": "evaluate", "metrics": summary})
    values = {row["name"]: row["value"] for row in summary}
    after = f", {values['revised/pass@1']:.3f} once revised" if revised else ""
    notice(f"round {spec.round}: held-out pass@1 {values['pass@1']:.3f}{after}")


_REVISED = tuple(column.name for column in EVALS.optional)


def _rows(
    spec: EvaluateSpec,
    asked: list[dict[str, Any]],
    requests: Sequence[Request],
    completions: Sequence[Completion],
    reader: Reader,
) -> list[scorers.Row]:
    from rollway.policies import causal_lm

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
    return rows


def _judged(
    spec: EvaluateSpec, rows: list[scorers.Row], completions: Sequence[Completion], cache: Path
) -> list[dict[str, Any]]:
    """Rows of table `evals`."""
    import torch

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
    return [
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
    ]


def _revisions(
    spec: EvaluateSpec,
    rows: list[scorers.Row],
    judged: list[dict[str, Any]],
    requests: Sequence[Request],
    reader: Reader,
) -> list[Request]:
    """What is read for the second answers."""
    from rollway.engines.base import Request
    from rollway.scorers.contexts import Private, worded

    assert spec.evaluate.revise is not None
    found = []
    for row, verdict, request in zip(rows, judged, requests, strict=True):
        private = Private(None, None, verdict["correct"], {})
        worded_ids = worded([spec.evaluate.revise], row, private, reader, request.prompt_tokens)
        assert worded_ids is not None
        found.append(Request(f"{request.rollout_id}-revised", worded_ids[1]))
    return found
