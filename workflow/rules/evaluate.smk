rule evaluate:
    input:
        prompts=plan.heldout_prompts,
        policy=plan.evaluated_policy,
        reward_model=plan.evaluating_reward_model,
    output:
        evals=f"{RESULTS}/{{run}}/r{{round}}/evals.parquet",
        metrics=f"{RESULTS}/{{run}}/r{{round}}/evals.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/evaluate.log",
    threads: 1
    resources:
        gpu=rollout_gpus,
    params:
        spec=plan.evaluate_spec,
    shell:
        "rollway stage evaluate --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --policy {input.policy:q}"
        f" --cache {RESULTS}/.cache"
        " --evals {output.evals:q} --metrics {output.metrics:q}"
