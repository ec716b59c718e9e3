"""What is wrong with a file, and what mends it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong."""

    file: Path
    wrong: str
    stage: str
    """Whose job wrote the file: the one to run again."""

    def __str__(self) -> str:
        if self.stage == "import":
            return f"{self.file}: {self.wrong}; it was imported: import it again"
        # No rule names the figures of a warm-up, which has some only where it has `sft`.
        made = self.file.with_name("policy.json") if self.stage == "warmup" else self.file
        return f"{self.file}: {self.wrong}; rerun {self.stage}: `snakemake --force {made}`"


def some(values: list[str], most: int = 3) -> str:
    """The first few, and how many more there are."""
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return ", ".join(values[:most]) + more
