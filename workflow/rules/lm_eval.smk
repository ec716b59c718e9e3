rule lm_eval:
    input:
        policy=plan.lm_evals.policy,
        files=plan.lm_evals.files,
    output:
        metrics=f"{RESULTS}/{{run}}/r{{round}}/lm_eval.json",
        answers=f"{RESULTS}/{{run}}/r{{round}}/lm_eval_results.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/lm_eval.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.lm_evals.spec,
    shell:
        "rollway stage lm_eval --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --policy {input.policy:q} --metrics {output.metrics:q} --answers {output.answers:q}"
