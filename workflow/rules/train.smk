rule train:
    input:
        batch=plan.batch,
        rollouts=plan.trained_rollouts,
        policy=plan.train_policy,
        reference=plan.reference_policy,
        checks=plan.teachers.checks_before,
        teacher=plan.teachers.other,
    output:
        policy=f"{RESULTS}/{{run}}/r{{next}}/policy.json",
        metrics=f"{RESULTS}/{{run}}/r{{next}}/metrics.json",
    log:
        f"{LOGS}/{{run}}/r{{next}}/train.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.train_spec,
    shell:
        "rollway stage train --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --batch {input.batch:q} --rollouts {input.rollouts:q} --policy {input.policy:q}"
        " --reference {input.reference:q} --next-policy {output.policy:q} --metrics {output.metrics:q}"
