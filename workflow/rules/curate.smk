rule curate:
    input:
        prompts=plan.train_prompts,
        rollouts=plan.batch_rollouts,
        scores=plan.batch_scores,
        sql=plan.curate_sql,
    output:
        batch=f"{RESULTS}/{{run}}/r{{round}}/batch.parquet",
        metrics=f"{RESULTS}/{{run}}/r{{round}}/curate.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/curate.log",
    resources:
        mem_mb=2000,
    params:
        spec=plan.curate_spec,
    shell:
        "rollway stage curate --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --memory {resources.mem_mb} --prompts {input.prompts:q}"
        " --rollouts {input.rollouts:q} --scores {input.scores:q}"
        " --batch {output.batch:q} --metrics {output.metrics:q}"
