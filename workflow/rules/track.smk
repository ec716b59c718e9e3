rule track:
    input:
        run=f"{RESULTS}/{{run}}/run.json",
        metrics=plan.run_metrics,
        report=f"{RESULTS}/report.html",
    output:
        tracked=f"{RESULTS}/{{run}}/tracked.json",
    log:
        f"{LOGS}/{{run}}/track.log",
    resources:
        mlflow=1,
    params:
        spec=plan.track_spec,
    shell:
        "rollway stage track --spec {params.spec:q} --log {log:q}"
        " --run {input.run:q} --report {input.report:q} --tracked {output.tracked:q}"
