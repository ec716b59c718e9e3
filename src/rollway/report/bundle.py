"""Style sheets and scripts of the page, inlined: modules in the order in which they need each other."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

STYLES = ("uplot/uPlot.min.css", "base.css", "browser.css", "panels.css")
LIBRARY = "uplot/uPlot.iife.min.js"
MODULES = (
    "dom.js",
    "data.js",
    "state.js",
    "series.js",
    "charts.js",
    "curves.js",
    "overview.js",
    "tokens.js",
    "filters.js",
    "group.js",
    "rollouts.js",
    "compare.js",
    "health.js",
    "cost.js",
    "graph.js",
    "runs.js",
    "keys.js",
    "live.js",
    "main.js",
)
_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([\w-]+\.js)";$', re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?function|const|class)", re.MULTILINE)
_EXPORTED = re.compile(r"^export (?:(?:async )?function|const|class) (\w+)", re.MULTILINE)


@cache
def styles() -> str:
    return "".join(_asset(name) for name in STYLES)


@cache
def script() -> str:
    """The library, then every module as a function that returns what it exports."""
    modules = "\n".join(map(module, MODULES))
    return f'{_asset(LIBRARY)}\n(() => {{\n"use strict";\nconst modules = {{}};\n{modules}\n}})();\n'


def module(name: str) -> str:
    source = _asset(name)
    exported = ", ".join(_EXPORTED.findall(source))
    body = _EXPORT.sub("", _IMPORT.sub(r'const \1 = modules["\2"];', source))
    return f'modules["{name}"] = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();'


@cache
def script_hash() -> str:
    """The one script that the page's Content-Security-Policy lets run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script().encode()).digest()).decode()


def _asset(name: str) -> str:
    return (files("rollway.report") / "assets" / name).read_text(encoding="utf-8")
