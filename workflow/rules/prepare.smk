rule prepare:
    input:
        plan.task_files,
    output:
        train=f"{RESULTS}/tasks/{{task}}/train.parquet",
        heldout=f"{RESULTS}/tasks/{{task}}/heldout.parquet",
    log:
        f"{LOGS}/tasks/{{task}}.log",
    params:
        spec=plan.prepare_spec,
    shell:
        "rollway stage prepare --spec {params.spec:q} --log {log:q}"
        " --train {output.train:q} --heldout {output.heldout:q}"
