"""The benches are scripts in a folder of their own. It is not put on the path: a bench named like a folder of tests,
`curation`, would hide that folder."""

import importlib.util
import sys
from pathlib import Path

NAMES = ("harness", "table", "process_memory", "rl_bed", "rl_stages", "run", "workflow_overhead", "load")
PAGES = ("method_pages", "distillation_bench_mechanisms", "distillation_figures", "distillation_bench")

for name in (*NAMES, *PAGES):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "benchmarks" / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
