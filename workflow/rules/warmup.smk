rule warmup:
    input:
        prompts=plan.warmup_prompts,
    output:
        policy=f"{RESULTS}/warmups/{{warmup}}-s{{seed}}/policy.json",
    log:
        f"{LOGS}/warmups/{{warmup}}-s{{seed}}.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.warmup_spec,
    shell:
        "rollway stage warmup --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --policy {output.policy:q}"
