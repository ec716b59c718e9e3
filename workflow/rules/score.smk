rule score:
    input:
        prompts=plan.train_prompts,
        rollouts=plan.scored_rollouts,
        needs=plan.needed_scores,
        code=plan.scorer_files,
        reward_model=plan.scoring_reward_model,
        policies=plan.teachers.policies,
    output:
        scores=f"{RESULTS}/{{run}}/r{{round}}/p{{p}}/scores/{{scorer}}-{{shard}}.parquet",
    log:
        f"{LOGS}/{{run}}/r{{round}}/score-p{{p}}-{{scorer}}-{{shard}}.log",
    resources:
        gpu=lambda w: GPU_PER_JOB if plan.scores_with_a_model(w) else 0,
    params:
        spec=plan.score_spec,
    shell:
        "rollway stage score --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --rollouts {input.rollouts:q} --needs {input.needs:q}"
        f" --cache {RESULTS}/.cache"
        " --scores {output.scores:q}"
