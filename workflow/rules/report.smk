rule describe:
    output:
        run=f"{RESULTS}/{{run}}/run.json",
    log:
        f"{LOGS}/{{run}}/describe.log",
    params:
        spec=plan.describe_spec,
    shell:
        "rollway stage describe --spec {params.spec:q} --log {log:q} --run {output.run:q}"


rule catalog:
    input:
        runs=plan.descriptions(),
        metrics=plan.all_metrics(),
        scores=plan.all_scores(),
    output:
        database=f"{RESULTS}/rollway.duckdb",
    log:
        f"{LOGS}/catalog.log",
    params:
        spec=plan.catalog_spec,
    shell:
        "rollway stage catalog --spec {params.spec:q} --log {log:q} --database {output.database:q}"


rule report:
    input:
        runs=plan.descriptions(),
        metrics=plan.all_metrics(),
        scores=plan.all_scores(),
    output:
        html=report(
            f"{RESULTS}/report.html",
            caption="../report/report.rst",
            category="Runs",
            subcategory="Report",
            labels={
                "page": "learning curves and rollouts",
                "about": "curves, rollout browser, comparison, health, time, configs",
            },
        ),
    log:
        f"{LOGS}/report.log",
    params:
        spec=plan.report_spec,
    shell:
        "rollway stage report --spec {params.spec:q} --log {log:q} --html {output.html:q}"
