"""Files that a stage reads because its spec names them, for the account that what it writes gives of itself."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rollway.config.assets import folder


def of_spec(stage: str, spec: Any) -> dict[str, list[Path]]:
    """Files that a spec names beside the arguments, by role: a reward model or discriminator (`trained`), a policy that
    teaches, the user's own scorer and SQL. A model of Hugging Face is named in the spec alone."""
    found: dict[str, list[Path]] = {}
    match stage:
        case "score":
            code = spec.config.function.rpartition(":")[0] if spec.config.kind == "python" else ""
            named = {"trained": spec.trained, "teacher": spec.teacher, "code": code if code.endswith(".py") else None}
        case "rollout":
            named = {"author": spec.author, "teacher": spec.teacher}
        case "train":
            named = {"teacher": spec.teacher}
        case "evaluate" | "check_teacher":
            named = {"trained": spec.trained}
        case "curate":
            from rollway.curation import sql_paths

            named, found = {}, {"sql": list(own_sql(sql_paths(spec.curate)))}
        case _:
            named = {}
    found |= {role: [Path(name)] for role, name in named.items() if name}
    return {role: there for role, paths in found.items() if (there := [path for path in paths if path.exists()])}


def own_sql(paths: Iterable[Path]) -> Iterator[Path]:
    """SQL files that do not come with rollway."""
    shipped = folder("sql").resolve()
    return (path for path in paths if not path.resolve().is_relative_to(shipped))
