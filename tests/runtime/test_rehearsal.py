"""What the worker does once for all its children leaves nothing behind that forks break or jobs notice."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("torch")

CODE = """
import hashlib, json, os, random
os.environ['OPENBLAS_NUM_THREADS'] = '1'
import duckdb, numpy, pandas, pyarrow.parquet, torch, transformers
from rollway.runtime import rehearsal

def state():
    noise = (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()), torch.initial_seed())
    return hashlib.sha256(repr(noise).encode()).hexdigest()

torch.set_num_threads(1)
before, threads = state(), len(os.listdir("/proc/self/task"))
for part in rehearsal.PARTS.values():
    part()
found = {
    "state": state() == before,
    "threads": len(os.listdir("/proc/self/task")) - threads,
    "cuda": torch.cuda.is_initialized(),

}
read, write = os.pipe()
child = os.fork()
if child == 0:
    # A job of the child's own: threads, a backward pass, and the SQL engine that the parent has opened.
    torch.set_num_threads(2)
    weight = torch.randn(300, 300, requires_grad=True)
    (weight @ weight).square().sum().backward()
    from rollway import curation
    from rollway.config import load_recipe
    steps = curation.plan(load_recipe("ngrpo").curate)
    os.write(write, f"{bool(weight.grad.isfinite().all())} {len(steps) > 0}".encode())
    os._exit(0)
os.close(write)
found["child"] = os.read(read, 100).decode()
print(json.dumps(found))
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the warm worker needs Linux")
def test_a_rehearsal_leaves_neither_threads_nor_randomness_nor_cuda_behind() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"state": True, "threads": 0, "cuda": False, "child": "True True"}
