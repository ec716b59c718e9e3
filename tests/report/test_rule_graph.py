"""The rule graph of the report is the workflow's."""

import re

from rollway.report.data import Run
from rollway.report.structure import RULES, differences, flat, forks
from workflow.project import TINY, Project


def test_every_edge_of_the_workflow_is_in_the_graph(tmp_path):
    runs = {
        "grpo": {"recipe": "grpo"},
        "dr": {"recipe": "dr-grpo", "fork": {"run": "grpo", "round": 1, "stage": "score"}},
    }
    project = Project(tmp_path / "p", {**TINY, "runs": runs})
    drawn = project.snakemake("--rulegraph", "dot").stdout
    names = dict(re.findall(r'^\s*(\d+)\[label = "(\w+)"', drawn, re.MULTILINE))
    edges = {(names[a], names[b]) for a, b in re.findall(r"^\s*(\d+) -> (\d+)", drawn, re.MULTILINE)}
    edges = {(a, b) for a, b in edges if b != "all"}
    assert ("rollout", "score") in edges and ("curate", "train") in edges, drawn
    mine = {(need, rule) for rule, needs in RULES.items() for need in needs}
    assert edges - mine == set()
    assert {rule for edge in edges for rule in edge} <= set(RULES)


def run(name, parent=None, **info):
    return Run(name, name.removesuffix("-s0"), 0, {"parent": parent, "rounds": 3, **info})


def test_forks_follow_their_parents_however_they_are_named():
    found = forks(
        [
            run("a-s0", "b-s0", fork_round=2, fork_stage="score"),
            run("b-s0"),
            run("c-s0", "a-s0"),
            run("d-s0", "gone-s0"),
        ]
    )
    assert [(row["run"], row["depth"]) for row in found] == [("b-s0", 0), ("a-s0", 1), ("c-s0", 2), ("d-s0", 0)]
    assert (found[1]["parent"], found[1]["round"], found[1]["stage"]) == ("b-s0", 2, "score")


def test_a_circle_of_forks_ends():
    assert forks([run("a-s0", "b-s0"), run("b-s0", "a-s0")]) == []


def test_only_differences_are_listed():
    one = {"train": {"lr": 0.1, "kl": {}}, "seeds": [0], "list": [1, 2]}
    other = {"train": {"lr": 0.2, "kl": {}}, "seeds": [1], "list": [1, 2], "more": True}
    assert flat(one) == {"train.lr": 0.1, "train.kl": {}, "seeds": [0], "list": [1, 2]}
    assert differences([run("a-s0", config=one), run("b-s0", config=other)]) == [
        {"key": "more", "values": {"a": "(absent)", "b": True}},
        {"key": "train.lr", "values": {"a": 0.1, "b": 0.2}},
    ]
