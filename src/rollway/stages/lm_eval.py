"""lm_eval: a policy -> the figures that EleutherAI's harness gives it, and the harness's own results."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.runtime.notice import notice
from rollway.runtime.specs import LmEvalSpec
from rollway.store import provenance
from rollway.store.atomic import write_json

PYTHON = "ROLLWAY_LM_EVAL_PYTHON"
"""Names the Python of an environment that has lm-eval, where it is not rollway's own."""
NORMAL = 1.959963984540054
"""0.975 quantile of the normal distribution: half the width of a 95 % interval in standard errors."""
MACHINE = ("pretty_env_info", "transformers_version", "lm_eval_version", "git_hash", "start_time", "end_time", "date")
MACHINE_PREFIXES = ("model_name", "model_source", "total_evaluation_time", "config_source")


def run(spec: LmEvalSpec, *, policy: Path, metrics: Path, answers: Path) -> None:
    """Exports the policy (a LoRA merged into its base) into a folder of the job's own and runs `lm_eval` on it.

    metrics: one figure per task, metric and filter, `TASK/METRIC` or `TASK/METRIC/FILTER`, with the ends of a 95 %
    interval (normal, from the harness's standard error) where it gives one. answers: `results`, `configs`, `versions`
    and the like as the harness writes them, without what names the machine. Raises RollwayError where lm-eval is not
    installed or fails.
    """
    python = os.environ.get(PYTHON, sys.executable)
    _must_have(python)
    with tempfile.TemporaryDirectory(prefix="rollway-lm-eval-") as folder:
        model, out = Path(folder) / "model", Path(folder) / "out"
        dtype = export(policy, model)
        phases.mark("work")
        _evaluate(command(python, spec, model, out, dtype), spec)
        found = _results(out)
    figures = read(found)
    phases.mark("write")
    write_json(answers, portable(found))
    write_json(metrics, {"round": spec.round, "stage": "lm_eval", "metrics": figures, **provenance.said()})
    shown = [row for row in figures if not row["name"].endswith(("/low", "/high"))]
    notice(f"round {spec.round}: " + ", ".join(f"{row['name']} {row['value']:.3f}" for row in shown[:6]))


def export(policy: Path, folder: Path) -> str:
    """Writes weights, configuration and tokenizer as transformers reads them; returns the dtype of the weights."""
    from rollway.policies import causal_lm, manifest

    spec = manifest.named(policy, manifest.read_manifest(policy), "main")
    loaded = causal_lm.merged(causal_lm.load(policy))
    folder.mkdir()
    causal_lm.save_model(folder, loaded.model)
    causal_lm.save_tokenizer(folder, loaded.tokenizer)
    return spec.dtype


def command(python: str, spec: LmEvalSpec, model: Path, out: Path, dtype: str) -> list[str]:
    """What is run. Code that comes with a model or a data set is not trusted: the harness's default."""
    import torch

    config = spec.lm_eval
    given = [python, "-m", "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={model},dtype={dtype}"]
    given += ["--tasks", ",".join(config.tasks), "--batch_size", str(config.batch), "--seed", str(spec.seed)]
    given += ["--device", "cuda" if torch.cuda.is_available() else "cpu", "--output_path", str(out)]
    given += ["--include_path", config.include] if config.include is not None else []
    given += ["--num_fewshot", str(config.fewshot)] if config.fewshot is not None else []
    given += ["--limit", str(config.limit)] if config.limit is not None else []
    given += ["--apply_chat_template"] if config.chat else []
    return given


def read(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures of a results file of the harness as rows of the metrics table."""
    rows = []
    for task, values in sorted(found.get("results", {}).items()):
        for key, value in sorted(values.items()):
            metric, comma, filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            name = f"{task}/{metric}" if filter == "none" else f"{task}/{metric}/{filter}"
            rows.append({"name": f"lm_eval/{name}", "value": value})
            error = values.get(f"{metric}_stderr,{filter}")
            if _is_number(error):
                ends = {"low": value - NORMAL * error, "high": value + NORMAL * error}
                rows += [{"name": f"lm_eval/{name}/{end}", "value": at} for end, at in ends.items()]
    if not rows:
        raise RollwayError(f"lm-eval gave no figure for {', '.join(found.get('results', {})) or 'any task'}")
    return [{"step": 0, **row} for row in rows]


def portable(value: Any) -> Any:
    """Without times, versions of the machine's software and paths of the job's own folder."""
    match value:
        case dict():
            left = {k: v for k, v in value.items() if k not in MACHINE and not k.startswith(MACHINE_PREFIXES)}
            return {k: portable(v) for k, v in left.items() if k not in ("pretrained", "model_args")}
        case list():
            return [portable(each) for each in value]
        case _:
            return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _must_have(python: str) -> None:
    try:
        tried = subprocess.run([python, "-c", "import lm_eval"], capture_output=True, text=True)
        reason = tried.stderr.strip().splitlines()[-1:] if tried.returncode else None
    except OSError as error:
        reason = [str(error)]
    if reason is not None:
        raise RollwayError(
            f"`lm_eval` in the config asks for lm-eval, which {python} does not have ({' '.join(reason)}); "
            "`pip install 'rollway[lm-eval]'`, or name the Python of an environment that has it in "
            f"{PYTHON}, or remove `lm_eval`"
        )


def _evaluate(given: list[str], spec: LmEvalSpec) -> None:
    import torch

    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(given, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise RollwayError(
            f"lm_eval failed on {', '.join(spec.lm_eval.tasks)} (exit code {done.returncode}): "
            f"{lines[-1][:300] if lines else 'without a word'}\n" + "\n".join(lines[-30:])
        )


def _results(out: Path) -> dict[str, Any]:
    files = sorted(out.rglob("results_*.json"))
    if len(files) != 1:
        raise RollwayError(f"lm_eval wrote {len(files)} results files instead of one; is it version 0.4.9 or later?")
    found: dict[str, Any] = json.loads(files[0].read_text(encoding="utf-8"))
    return found
