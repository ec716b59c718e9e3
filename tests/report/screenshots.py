"""Takes the pictures of docs/report.md from a report, in a headless Chromium.

python tests/report/screenshots.py results/report.html docs/images/report
"""

import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report.browser import browser, chromium

VIEWS = {
    "overview": "overview",
    "curves": "curves",
    "rollouts": "rollouts?round=4&sort=-spread",
    "compare": "compare?a=grpo-s0@0&b=grpo-s0@30",
    "health": "health",
    "time": "cost",
    "runs": "runs",
}
KINDS = {
    "wide": (1280, 800, False),
    "wide-dark": (1280, 800, True),
    "phone": (390, 780, False),
    "phone-dark": (390, 780, True),
}


def main(page: Path, out: Path) -> None:
    """Every view wide and narrow, light and dark, each picture with 256 colours."""
    out.mkdir(parents=True, exist_ok=True)
    with browser(chromium() or sys.exit("no Chromium is installed")) as tab:
        for kind, (width, height, dark) in KINDS.items():
            tab.size(width, height, dark=dark, phone=width < 600)
            for name, view in VIEWS.items():
                tab.open(f"{page.resolve().as_uri()}#{view}")
                tab.run("new Promise((done) => setTimeout(done, 400))")
                path = out / f"{name}-{kind}.png"
                tab.picture(path)
                Image.open(path).convert("RGB").quantize(256).save(path, optimize=True)
                print(f"{path}: {path.stat().st_size / 1000:.0f} kB", tab.errors or "")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
