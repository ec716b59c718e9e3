rule rollout:
    input:
        prompts=plan.train_prompts,
        policy=plan.rollout_policy,
        earlier_rollouts=plan.earlier_rollouts,
        earlier_scores=plan.earlier_scores,
        sql=plan.refill_sql,
        stored=plan.stored_rollouts,
        author=plan.derived.author,
        teacher=plan.teachers.mixed,
    output:
        rollouts=f"{RESULTS}/{{run}}/r{{round}}/p{{p}}/rollouts-{{shard}}.parquet",
    log:
        f"{LOGS}/{{run}}/r{{round}}/rollout-p{{p}}-{{shard}}.log",
    threads: 1
    resources:
        gpu=rollout_gpus,
    params:
        spec=plan.rollout_spec,
    shell:
        "rollway stage rollout --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --policy {input.policy:q} --rollouts {output.rollouts:q}"
        " --earlier-rollouts {input.earlier_rollouts:q} --earlier-scores {input.earlier_scores:q}"
        " --stored {input.stored:q}"
