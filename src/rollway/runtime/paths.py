"""What file names say."""

import re
from pathlib import Path


def by_scorer(paths: list[Path]) -> dict[str, list[Path]]:
    """Score files under the name of their scorer: `scores/{scorer}-{shard}.parquet`."""
    files: dict[str, list[Path]] = {}
    for path in paths:
        files.setdefault(path.stem.rsplit("-", 1)[0], []).append(path)
    return files


def by_round(paths: list[Path]) -> dict[int, list[Path]]:
    """Rollout and score files under their round: `{run}/r{round}/p{pass}/...`."""
    files: dict[int, list[Path]] = {}
    for path in paths:
        round = next(part for part in reversed(path.parts) if re.fullmatch(r"r\d{4}", part))
        files.setdefault(int(round[1:]), []).append(path)
    return files
