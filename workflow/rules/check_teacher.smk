rule check_teacher:
    input:
        prompts=plan.train_prompts,
        rollouts=plan.teachers.checked_rollouts,
        needs=plan.teachers.checked_needs,
        code=plan.teachers.checked_files,
        reward_model=plan.evaluating_reward_model,
        policy=plan.teachers.check_policy,
        teacher=plan.teachers.checked_model,
    output:
        answers=f"{RESULTS}/{{run}}/r{{round}}/teacher-{{scorer}}.parquet",
        metrics=f"{RESULTS}/{{run}}/r{{round}}/teacher-{{scorer}}.json",
    log:
        f"{LOGS}/{{run}}/r{{round}}/check-teacher-{{scorer}}.log",
    threads: 1
    resources:
        gpu=GPU_PER_JOB,
    params:
        spec=plan.teachers.check_spec,
    shell:
        "rollway stage check_teacher --spec {params.spec:q} --log {log:q} --threads {threads}"
        " --prompts {input.prompts:q} --rollouts {input.rollouts:q} --needs {input.needs:q}"
        " --policy {input.policy:q} --teacher {input.teacher:q}"
        f" --cache {RESULTS}/.cache"
        " --answers {output.answers:q} --metrics {output.metrics:q}"
