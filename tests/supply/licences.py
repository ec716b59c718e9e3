"""The page docs/licences.md: what rollway needs, directly and through others, and under which licences.

`python tests/supply/licences.py > docs/licences.md`, from the metadata of what is installed (`make docs`).
"""

import re
import sys
from importlib import metadata

from packaging.requirements import Requirement

INTRO = """\
# Licences

rollway itself is under the [MIT licence](../LICENSE). This page lists what it needs to run (no extras), directly and
through others, with the licence that each package states in its metadata. Made by `make docs`
([licences.py](../tests/supply/licences.py)); a test compares it with what is installed. On a machine with a CUDA GPU
torch brings NVIDIA's libraries (`nvidia-*`, under NVIDIA's own licence) and triton (MIT) besides.

Nothing of these is part of rollway's repository; pip installs it from its own source.
"""
OF_THE_MACHINE = re.compile(r"nvidia-|cuda-|triton")
"""Packages that are there or not by platform."""


def needed(root: str = "rollway") -> dict[str, bool]:
    """Installed packages that `root` needs, by normalised name: whether directly."""
    found: dict[str, bool] = {}
    todo = [(requirement, True) for requirement in _requirements(root, "")]
    while todo:
        requirement, direct = todo.pop()
        name = _normal(requirement.name)
        try:
            metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # not for this platform
        if name not in found:
            found[name] = direct
            for extra in ("", *requirement.extras):
                todo += [(other, False) for other in _requirements(name, extra)]
        elif direct:
            found[name] = True
    return {name: found[name] for name in sorted(found) if not OF_THE_MACHINE.match(name)}


def _requirements(name: str, extra: str) -> list[Requirement]:
    read = [Requirement(text) for text in metadata.requires(name) or []]
    return [r for r in read if r.marker is None or r.marker.evaluate({"extra": extra})]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def licence(name: str) -> str:
    """As the package states it: an SPDX expression, else its classifiers, else the first line of its licence field."""
    about = metadata.metadata(name)
    if expression := about.get("License-Expression"):  # a missing one is None here, KeyError in the backport
        return expression
    named = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier") or [] if line.startswith("License ::")]
    named = [text for text in named if text != "OSI Approved"]
    if named:
        return " or ".join(sorted(set(named)))
    stated = (about.get("License") or "").strip().splitlines()
    return stated[0][:60] if stated else _from_files(name)


def _from_files(name: str) -> str:
    """By the words with which the licence file that the package brings grants what it grants."""
    known = {
        "Permission is hereby granted, free of charge": "MIT",
        "Apache License": "Apache-2.0",
        "Redistribution and use in source and binary forms": "BSD",
        "Permission to use, copy, modify, and/or distribute": "ISC",
    }
    for file in metadata.files(name) or []:
        if re.search(r"(LICEN[CS]E|COPYING)[^/]*$", str(file), re.IGNORECASE):
            text = " ".join(file.locate().read_text(encoding="utf-8", errors="replace").split())
            for words, short in known.items():
                if words.lower() in text.lower():
                    return f"{short} (by its licence file)"
    return "not stated"


def page() -> str:
    rows = needed()
    lines = [INTRO, "| package | needed | licence |", "|---|---|---|"]
    lines += [
        f"| {name} | {'directly' if direct else 'through others'} | {licence(name)} |" for name, direct in rows.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
