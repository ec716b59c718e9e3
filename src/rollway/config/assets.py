"""Where recipes, SQL files and built-in data lie: in the checkout, or inside the installed package."""

from difflib import get_close_matches
from pathlib import Path

from rollway.config.base import ConfigError

_PACKAGE = Path(__file__).resolve().parents[1]
_CHECKOUT = _PACKAGE.parents[1]
_FOLDERS = {"recipes": "config/recipes", "sql": "workflow/sql", "data": "data"}


def folder(kind: str) -> Path:
    """Folder of `recipes`, `sql` or `data`."""
    in_checkout = _CHECKOUT / _FOLDERS[kind]
    return in_checkout if in_checkout.is_dir() else _PACKAGE / "_assets" / kind


def relative(path: Path) -> str:
    """Relative to the working folder where it lies inside it, so that a moved project replans nothing."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def find(kind: str, name: str, suffix: str, subfolder: str = "") -> Path:
    """The file called `name`, or, where `name` is a path that ends in `suffix`, that file.

    Raises ConfigError that suggests near names.
    """
    if name.endswith(suffix):
        path = Path(name)
        if not _is_file(path):
            raise ConfigError(f"{name}: no such file (relative paths start at {Path.cwd()})")
        return path
    base = folder(kind) / subfolder
    path = base / f"{name}{suffix}"
    if not _is_file(path):
        known = sorted(p.name.removesuffix(suffix) for p in base.glob(f"*{suffix}"))
        near = get_close_matches(name, known, n=3) or known
        place = f"{_FOLDERS[kind]}/{subfolder}".rstrip("/")
        raise ConfigError(f"{name!r} is not in {place}; did you mean {', '.join(near) or 'a path of your own'}?")
    return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False  # a name too long for a file's, or a folder that may not be looked into
