"""What a person waits for at the prompt: `rollway --help`, and `snakemake -n` on the default config, cold processes."""

import subprocess
import sys
import tempfile
from pathlib import Path

import harness

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def main() -> int:
    chosen = harness.parser(__doc__, repeats=7).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        plan = [BIN / "snakemake", "-n", "--quiet", "all", "--snakefile", ROOT / "Snakefile"]
        plan += ["--configfile", ROOT / "config" / "config.yaml"]
        results = [
            harness.measure("cli", "`rollway --help`", lambda: _run([BIN / "rollway", "--help"], folder), bar=HELP),
            harness.measure("cli", "`snakemake -n`, default config", lambda: _run(plan, folder), bar=PLAN),
        ]
    return harness.finish(results, chosen)


HELP, PLAN = harness.at_most(0.3), harness.at_most(4.0)


def _run(command: list[str | Path], folder: str) -> None:
    subprocess.run([str(word) for word in command], cwd=folder, check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
