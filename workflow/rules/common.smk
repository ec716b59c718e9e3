import sys

from rollway.config import load_experiment
from rollway.errors import RollwayError
from rollway.runtime import clock, finish, termination, warm
from rollway.runtime.device import devices_of, gpus_per_job, shared
from rollway.runtime.plan import Plan
from rollway.runtime.plan_checks import check

# Rounds are chained through input functions, several frames per round.
sys.setrecursionlimit(200_000)

try:
    plan = Plan(load_experiment(config))
    check(plan)
except RollwayError as error:
    raise WorkflowError(f"rollway: error: {error}")

# Unless `--resources` says otherwise. A limit on nodes means that jobs run elsewhere (`local_exec` is not known yet).
for name, most in shared(local=workflow.resource_settings.nodes is None).items():
    if name not in workflow.global_resources:
        workflow.register_resource(name, most)

RESULTS = plan.results
LOGS = "logs" if RESULTS == "results" else f"{RESULTS}/logs"
GPU_PER_JOB = gpus_per_job()


def rollout_gpus(w):
    return GPU_PER_JOB * devices_of(plan.recipe(w.run, int(w.round)).rollout.engine)


WORKER_SOCKET = f"{RESULTS}/.worker/socket"


wildcard_constraints:
    run=plan.run_pattern(),
    round=r"\d{4}",
    next=r"\d{4}",
    p=r"\d",
    shard=r"\d{3}",
    scorer=r"[A-Za-z0-9_.-]+?",
    task=r"[A-Za-z0-9_.-]+",
    warmup=r"[A-Za-z0-9_.-]+",
    reward_model=r"[A-Za-z0-9_.-]+",
    seed=r"\d+",
