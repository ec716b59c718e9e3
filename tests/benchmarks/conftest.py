"""The benches are scripts in a folder of their own; tests import them as their scripts do."""

import sys
from pathlib import Path

# Last: some benches are named like packages of tests.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
