rule discriminator:
    input:
        prompts=plan.train_prompts,
        rollouts=plan.discriminators.rollouts,
        references=plan.discriminators.references,
        previous=plan.discriminators.previous,
        policy=plan.discriminators.policy,
    output:
        reward_model=f"{RESULTS}/{{run}}/r{{round}}/discriminators/{{scorer}}/reward_model.json",
        metrics=f"{RESULTS}/{{run}}/r{{round}}/discriminator-{{scorer}}.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/discriminator-{{scorer}}.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.discriminators.spec,
    shell:
        "rollway stage discriminator --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --rollouts {input.rollouts:q} --references {input.references:q}"
        " --previous {input.previous:q} --policy {input.policy:q}"
        " --reward-model {output.reward_model:q} --metrics {output.metrics:q}"
