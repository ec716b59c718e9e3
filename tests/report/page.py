"""What a report holds, read as a browser would: the elements of the page, and the data packed in it."""

import base64
import gzip
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Elements(HTMLParser):
    """Collects text, tags, attributes and scripts, and checks that tags are nested properly."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        match self.open[-1:]:
            case ["script"]:
                attributes, text = self.scripts[-1]
                self.scripts[-1] = (attributes, text + data)
            case ["style"]:
                pass
            case _:
                self.text.append(data)


class Page:
    """`text`: what a reader without scripts sees; `summary` and `parts`: the packed data."""

    def __init__(self, path: Path) -> None:
        self.raw = path.read_text(encoding="utf-8")
        self.elements = Elements()
        self.elements.feed(self.raw)
        self.elements.close()
        assert self.elements.open == []
        self.text = " ".join(" ".join(self.elements.text).split())
        packed = [(a, text) for a, text in self.elements.scripts if a.get("type") == "application/octet-stream"]
        self.summary: dict[str, Any] = next(unpack(text) for a, text in packed if a.get("id") == "data-summary")
        self.parts: dict[str, Any] = {a["data-run"]: unpack(text) for a, text in packed if a.get("class") == "part"}

    def curve(self, title: str) -> dict[str, list[list[Any]]]:
        return next(curve["series"] for curve in self.summary["curves"] if curve["title"] == title)

    def check(self, title: str) -> dict[str, Any]:
        return next(check for check in self.summary["health"] if check["title"] == title)


def unpack(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)), parse_constant=_refuse)


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON: browsers refuse it")
