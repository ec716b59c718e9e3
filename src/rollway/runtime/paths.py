"""What file names say."""

from pathlib import Path


def by_scorer(paths: list[Path]) -> dict[str, list[Path]]:
    """Score files under the name of their scorer: `scores/{scorer}-{shard}.parquet`."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    return files
