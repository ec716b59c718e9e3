rule warmup:
    input:
        prompts=plan.warmup_prompts,
    output:
        policy=f"{RESULTS}/warmups/{{warmup}}-s{{seed}}/policy.json",
    log:
        f"{LOGS}/warmups/{{warmup}}-s{{seed}}.log",
    params:
        spec=plan.warmup_spec,
    threads: 4
    resources:
        gpu=1,
    shell:
        "rollway stage warmup --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --policy {output.policy:q}"
