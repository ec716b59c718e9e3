"""A run's policy as a plain Hugging Face folder with a model card, and as a version in MLflow's model registry."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollway.config.experiment import EvaluateConfig
from rollway.errors import RollwayError
from rollway.policies import manifest
from rollway.store.catalog import with_catalog
from rollway.store.lineage import read_runs
from rollway.store.queries import rows as ask

if TYPE_CHECKING:
    from rollway.policies.manifest import NamedPolicy

FACTS = "rollway.json"


@dataclass(frozen=True)
class Source:
    """Which policy is exported, and where it came from."""

    run: str
    round: int
    policy: Path
    info: dict[str, Any]
    """What `run.json` holds."""
    evaluations: list[tuple[int, str, float, float | None, float | None]]
    """(round, figure, value, low, high) of every evaluation up to that round; low and high end its interval."""
    data: list[tuple[str, int, str]]
    """(split, prompts, sha256) of the task's files."""

    @property
    def confidence(self) -> float:
        """Coverage of the intervals: `evaluate.confidence` of the run's config."""
        config = self.info.get("config") or {}
        return float((config.get("evaluate") or {}).get("confidence", EvaluateConfig().confidence))


def export_model(results: Path, run: str, round: int | None, out: Path, *, adapter: bool = False) -> Source:
    """Writes weights (safetensors), configuration, tokenizer, model card and facts of a policy into a new folder.

    round: of the policy; None: the last one whose weights are there. A LoRA is merged into its base unless `adapter`.
    Raises RollwayError when there is no such policy, its weights were pruned, or `out` exists.
    """
    from rollway.policies import causal_lm

    if out.exists():
        raise RollwayError(f"{out}: exists already; name another folder with --out, or delete it")
    source = find(results, run, round)
    spec = manifest.named(source.policy, manifest.read_manifest(source.policy), "main")
    if adapter and spec.kind != "lora":
        raise RollwayError(f"{source.policy}: --adapter is for a LoRA, and this policy is {spec.kind}; leave it out")
    policy = causal_lm.load(source.policy)
    with causal_lm.whole_folder(out) as folder:
        if adapter:
            causal_lm.save_adapter(folder, policy)
        else:
            policy = causal_lm.merged(policy)
            causal_lm.save_model(folder, policy.model)
        causal_lm.save_tokenizer(folder, policy.tokenizer)
        (folder / "README.md").write_text(card(source, spec, adapter=adapter), encoding="utf-8")
        (folder / FACTS).write_text(json.dumps(facts(source), indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return source


def find(results: Path, run: str, round: int | None) -> Source:
    """The policy of a run's round, and what is known of it. Raises RollwayError naming the rounds there are."""
    runs = read_runs(results)
    if run not in runs:
        raise RollwayError(f"{results}: has no run {run!r}; it has {', '.join(runs) or 'none'}")
    there = {
        int(path.parent.name[1:]): path for path in sorted(results.glob(f"{run}/r[0-9][0-9][0-9][0-9]/policy.json"))
    }
    with_weights = {r: path for r, path in there.items() if (path.parent / "weights").is_dir()}
    if round is None and not with_weights:
        raise RollwayError(f"{results / run}: holds no trained policy yet; run the workflow first")
    chosen = max(with_weights) if round is None else round
    if chosen not in with_weights:
        mend = f"rounds with weights: {', '.join(map(str, with_weights)) or 'none'}"
        if chosen in there:
            mend = f"its weights were pruned; `snakemake --force {there[chosen]}` makes them again"
        raise RollwayError(f"run {run}: round {chosen} has no policy to export; {mend}")
    evaluations, data = _evaluations(results, run, chosen), _data(results, runs[run])
    return Source(run, chosen, with_weights[chosen], runs[run], evaluations, data)


def _evaluations(results: Path, run: str, round: int) -> list[tuple[int, str, float, float | None, float | None]]:
    query = """SELECT round, name, value FROM seen_metrics
        WHERE run = ? AND round <= ? AND stage = 'evaluate' ORDER BY round, name"""
    found = with_catalog(results, lambda catalog: ask(catalog, query, run, round))
    values = {(at, name.removeprefix("evaluate/")): value for at, name, value in found}
    return [
        (at, name, value, values.get((at, f"{name}/low")), values.get((at, f"{name}/high")))
        for (at, name), value in values.items()
        if not name.endswith(("/low", "/high")) and value is not None
    ]


def _data(results: Path, info: dict[str, Any]) -> list[tuple[str, int, str]]:
    import pyarrow.parquet as pq

    files = sorted((results / "tasks" / str(info.get("task", ""))).glob("*.parquet")) if info.get("task") else []
    return [(path.stem, pq.read_metadata(path).num_rows, manifest.file_sha256(path)) for path in files]


def facts(source: Source) -> dict[str, Any]:
    """What a program wants to know of an exported policy."""
    info = source.info
    return {
        "run": source.run,
        "round": source.round,
        "policy": manifest.digest(source.policy),
        "recipe": info.get("recipe"),
        "seed": info.get("seed"),
        "task": info.get("task"),
        "data": [{"split": split, "prompts": prompts, "sha256": digest} for split, prompts, digest in source.data],
        "evaluations": [
            {"round": round, "name": name, "value": value, "low": low, "high": high}
            for round, name, value, low, high in source.evaluations
        ],
        "confidence": source.confidence,
        "config": info.get("config"),
    }


def card(source: Source, spec: "NamedPolicy", *, adapter: bool = False) -> str:
    """The model card: data, recipe, evaluation with intervals, how to load it, what it is not."""
    info = source.info
    front = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    lines = ["---", *(f"{key}: {value}" for key, value in front.items())]
    lines += [f"base_model: {spec.base}"] if spec.base and not Path(spec.base).is_dir() else []
    lines += ["tags: [rollway, reinforcement-learning]", "---", "", f"# {source.run}, round {source.round}", ""]
    base = Path(spec.base).name if spec.base and Path(spec.base).is_dir() else spec.base
    start = f"`{base}`" if base else "random weights and a supervised warm-up"
    updates = manifest.read_manifest(source.policy).updates
    lines += [
        f"Post-trained with rollway: recipe `{info.get('recipe')}` ({info.get('title', '')}), seed {info.get('seed')},"
        f" {source.round} rounds, {updates} optimiser updates, from {start}.",
        "",
        "## Load",
        "",
        "```python",
        *_loading(spec, adapter),
        "```",
        "",
        "## Data",
        "",
        f"Task `{info.get('task')}`.",
        "",
        "| split | prompts | sha256 |",
        "|---|---|---|",
        *(f"| {split} | {prompts} | `{digest[:16]}` |" for split, prompts, digest in source.data),
        "",
        "## Evaluation",
        "",
        *_evaluation_table(source),
        "",
        "## Settings",
        "",
        "```json",
        json.dumps(info.get("config"), indent=1, sort_keys=True),
        "```",
        "",
        "Measured on the task named above and nothing else; one seed. The intervals say how sure a figure is for other",
        "prompts of the same task, not for other tasks, nor for another run of the training.",
        "",
    ]
    return "\n".join(lines)


def _loading(spec: "NamedPolicy", adapter: bool) -> list[str]:
    if adapter:
        return [
            "from peft import AutoPeftModelForCausalLM",
            "from transformers import AutoTokenizer",
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="{spec.dtype}")',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
    ]


def _evaluation_table(source: Source) -> list[str]:
    """The first and the last evaluation up to the exported round."""
    if not source.evaluations:
        return ["No evaluation was made of this run."]
    rounds = sorted({row[0] for row in source.evaluations})
    lines = ["Held-out prompts, sampled as in the settings below.", ""]
    lines += [f"| round | figure | value | {100 * source.confidence:g} % interval |", "|---|---|---|---|"]
    for round, name, value, low, high in source.evaluations:
        if round in (rounds[0], rounds[-1]):
            interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
            lines.append(f"| {round} | {name} | {value:.3f} | {interval} |")
    if rounds[-1] != source.round:
        lines += ["", f"Round {source.round} itself was not evaluated; the last evaluation is of round {rounds[-1]}."]
    return lines


def register(folder: Path, source: Source, name: str, uri: str) -> str:
    """Makes `folder` a new version of the registered model `name`; returns "NAME version N".

    Its files become artifacts of the run's MLflow run, which `rollway track` makes. Raises RollwayError without it.
    """
    from rollway.tracking.mlflow_projection import register_version

    facts_of = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    tags = {"rollway.policy": facts_of["policy"], "rollway.round": str(source.round)}
    return register_version(folder, source.run, name, uri, tags)
