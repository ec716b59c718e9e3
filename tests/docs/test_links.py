"""Links in README, config and docs lead to files; what a link calls by a function's name is defined there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "config/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def links(page: Path) -> list[tuple[str, str]]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return [(label, target) for label, target in LINK.findall(text) if not target.startswith(("http:", "https:"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files(page: Path) -> None:
    for _, target in links(page):
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{page.relative_to(ROOT)}: {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page.relative_to(ROOT)}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_functions_that_links_name_are_defined_there(page: Path) -> None:
    for label, target in links(page):
        if label.isidentifier() and target.endswith(".py"):
            assert label in functions((page.parent / target).resolve()), (
                f"{page.relative_to(ROOT)}: {label} in {target}"
            )


def test_functions_are_looked_for() -> None:
    named = [
        label for page in PAGES for label, target in links(page) if label.isidentifier() and target.endswith(".py")
    ]
    assert {"clip_gate", "returns", "numerator"} <= set(named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_method_pages_name_exist(page: Path) -> None:
    named = re.findall(r"\((?:\.\./)+(tests/[\w/]+\.py)\) \(`(\w+)`\)", page.read_text(encoding="utf-8"))
    for file, name in named:
        assert name in functions(ROOT / file), f"{page.relative_to(ROOT)}: {name} in {file}"


def test_every_page_is_reached_from_the_index() -> None:
    reached, todo = set(), [ROOT / "docs/index.md"]
    while todo:
        page = todo.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = [(page.parent / target.partition("#")[0]).resolve() for _, target in links(page)]
        todo += [target for target in targets if target.suffix == ".md" and target.exists()]
    assert {page for page in PAGES if page.parent != ROOT / "config"} <= reached


def anchors(page: Path) -> set[str]:
    """Ids given in the page, and those that GitHub makes of headings."""
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef))


def test_no_measurement_is_missing() -> None:
    """A page either states a figure with its command, or says that it was not measured."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert [page.name for page in pages if "measured:" in page.read_text(encoding="utf-8")] == []
