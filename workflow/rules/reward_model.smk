rule reward_model:
    input:
        prompts=plan.reward_models.prompts,
        rollouts=plan.reward_models.rollouts,
        scores=plan.reward_models.scores,
        policy=plan.reward_models.policy,
        files=plan.reward_models.files,
    output:
        reward_model=f"{RESULTS}/reward_models/{{reward_model}}/reward_model.json",
        metrics=f"{RESULTS}/reward_models/{{reward_model}}/metrics.json",
    log:
        f"{LOGS}/reward_models/{{reward_model}}.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.reward_models.spec,
    shell:
        "rollway stage reward_model --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --rollouts {input.rollouts:q} --scores {input.scores:q}"
        " --policy {input.policy:q} --reward-model {output.reward_model:q} --metrics {output.metrics:q}"
