"""Look around in a results folder: curves, groups, rollouts, tokens, and a cell for questions of one's own.

pip install 'rollway[explore]'
marimo edit notebooks/explore.py -- --results results
"""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="rollway: explore")

with app.setup:
    from pathlib import Path

    import marimo as mo

    from rollway.errors import RollwayError
    from rollway.store.catalog import open_catalog
    from rollway.store.queries import ask

    QUERIES = {
        "runs": "SELECT DISTINCT run FROM seen_rollouts ORDER BY run",
        "rounds": "SELECT DISTINCT round FROM seen_rollouts WHERE run = $run ORDER BY round",
        "learning": "SELECT run, round, pass_1, pass_4, length, truncated FROM learning ORDER BY run, round",
        "curves": """SELECT round, stage, name, avg(value) AS value FROM seen_metrics
            WHERE run = $run AND stage IN ('train', 'curate') AND value IS NOT NULL GROUP BY ALL ORDER BY ALL""",
        "groups": """SELECT group_id, prompt_id, samples, right_samples, reward, reward_std, signal, length
            FROM groups WHERE run = $run AND round = $round ORDER BY signal DESC, reward, group_id""",
        "group": """SELECT sample, reward, advantage, correct, length, finish, text, rollout_id
            FROM scored WHERE run = $run AND round = $round AND group_id = $group ORDER BY sample""",
        "by_prompt": """SELECT prompt_id, split, rounds, shares, gain FROM learning_by_prompt
            WHERE run = $run ORDER BY abs(gain) DESC, prompt_id LIMIT 50""",
        "tokens": """SELECT position, token, logprob, entropy, trained FROM tokens
            WHERE run = $run AND round = $round AND rollout_id = $rollout ORDER BY position""",
        "duplicates": """SELECT round, avg(share) AS repeated, max(copies) AS most_copies FROM duplicates
            WHERE run = $run GROUP BY round ORDER BY round""",
    }


@app.cell
def _():
    folder = mo.ui.text(value=str(mo.cli_args().get("results") or "results"), label="results folder")
    mo.vstack([mo.md("# What did the policy do?"), folder])
    return (folder,)


@app.cell
def _(folder):
    mo.stop(
        not Path(folder.value).is_dir(), mo.md(f"`{folder.value}` is no folder. Run the workflow, or name another.")
    )
    catalog = open_catalog(Path(folder.value))

    def table(name, **values):
        """The answer to one of QUERIES as rows."""
        cursor = catalog.execute(QUERIES[name], values or None)
        columns = [column[0] for column in cursor.description]
        return [dict(zip(columns, row, strict=True)) for row in cursor.fetchall()]

    return catalog, table


@app.cell
def _(table):
    _names = [row["run"] for row in table("runs")]
    mo.stop(not _names, mo.md("There are no rollouts in this folder yet."))
    run = mo.ui.dropdown(_names, value=_names[0], label="run")
    return (run,)


@app.cell
def _(run, table):
    _there = [row["round"] for row in table("rounds", run=run.value)]
    round_ = mo.ui.slider(steps=_there, value=_there[-1], label="round", show_value=True)
    mo.hstack([run, round_], justify="start")
    return (round_,)


@app.cell
def _(table):
    mo.vstack([mo.md("## Held-out accuracy"), mo.ui.table(table("learning"), selection=None)])
    return


@app.cell
def _(run, table):
    measured = table("curves", run=run.value)
    _figures = sorted({f"{row['stage']}/{row['name']}" for row in measured})
    mo.stop(not _figures, mo.md("Nothing was measured yet."))
    _chosen = "curate/reward_mean" if "curate/reward_mean" in _figures else _figures[0]
    figure = mo.ui.dropdown(_figures, value=_chosen, label="figure")
    return figure, measured


@app.cell
def _(figure, measured):
    _points = [(row["round"], row["value"]) for row in measured if f"{row['stage']}/{row['name']}" == figure.value]
    _low, _high = min(v for _, v in _points), max(v for _, v in _points)
    _width = max(1, max(r for r, _ in _points))
    _line = " ".join(
        f"{10 + 580 * r / _width:.1f},{150 - 140 * (v - _low) / ((_high - _low) or 1):.1f}" for r, v in _points
    )
    _line = f'<polyline points="{_line}" fill="none" stroke="steelblue" stroke-width="2"/>'
    _svg = f'<svg viewBox="0 0 600 160">{_line}</svg>'
    mo.vstack([mo.md("## Curves"), figure, mo.Html(_svg), mo.md(f"from {_low:.4g} to {_high:.4g}")])
    return


@app.cell
def _(round_, run, table):
    groups = mo.ui.table(table("groups", run=run.value, round=round_.value), selection="single", page_size=10)
    mo.vstack([mo.md("## Groups of this round: choose one"), groups])
    return (groups,)


@app.cell
def _(groups, round_, run, table):
    mo.stop(not groups.value, mo.md("No group is chosen."))
    rollouts = mo.ui.table(
        table("group", run=run.value, round=round_.value, group=groups.value[0]["group_id"]), selection="single"
    )
    mo.vstack([mo.md("## Its rollouts: choose one"), rollouts])
    return (rollouts,)


@app.cell
def _(rollouts, round_, run, table):
    mo.stop(not rollouts.value, mo.md("No rollout is chosen."))
    _tokens = table("tokens", run=run.value, round=round_.value, rollout=rollouts.value[0]["rollout_id"])
    mo.vstack([mo.md("## Its tokens (nats)"), mo.ui.table(_tokens, selection=None)])
    return


@app.cell
def _(run, table):
    mo.vstack(
        [
            mo.md("## Prompts that moved most"),
            mo.ui.table(table("by_prompt", run=run.value), selection=None),
            mo.md("## Samples that say the same"),
            mo.ui.table(table("duplicates", run=run.value), selection=None),
        ]
    )
    return


@app.cell
def _():
    question = mo.ui.code_editor(
        value="SELECT run, round, avg(signal::INT) AS with_signal\nFROM groups GROUP BY ALL ORDER BY ALL",
        language="sql",
        label="A question of your own (read-only)",
    )
    question  # noqa: B018 (a cell shows its last expression)
    return (question,)


@app.cell
def _(catalog, question):
    try:
        _shown = mo.ui.table(ask(catalog, question.value).to_pylist(), selection=None)
    except RollwayError as error:
        _shown = mo.md(f"```\n{error}\n```")
    _shown  # noqa: B018
    return


if __name__ == "__main__":
    app.run()
