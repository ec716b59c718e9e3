rule evaluate:
    input:
        prompts=plan.heldout_prompts,
        policy=plan.evaluated_policy,
    output:
        evals=f"{RESULTS}/{{run}}/r{{round}}/evals.parquet",
        metrics=f"{RESULTS}/{{run}}/r{{round}}/evals.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/evaluate.log",
    params:
        spec=plan.evaluate_spec,
    threads: 4
    resources:
        gpu=1,
    shell:
        "rollway stage evaluate --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --policy {input.policy:q}"
        " --evals {output.evals:q} --metrics {output.metrics:q}"
