"""policy.json: the one file that stands for a policy. It lists the named policies with the digests of their files."""

from dataclasses import asdict, dataclass, field
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Literal

from rollway.errors import RollwayError
from rollway.store.atomic import read_json, write_json

VERSION = 1
MADE_BY = "the warmup or train stage"


@dataclass(frozen=True)
class NamedPolicy:
    """One model of a run."""

    kind: Literal["full", "lora", "base", "critic"]
    """full: all weights in `folder`. lora: an adapter in `folder` over `base`. base: `base` as it is. critic: full,
    with a value head."""
    folder: str | None = None
    """Relative to policy.json."""
    base: str | None = None
    """Hub name or folder of the model that `lora` and `base` stand on."""
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    files: dict[str, str] = field(default_factory=dict)
    """File name -> sha256, relative to `folder`; for `base` relative to that folder (empty where it is on the hub)."""


@dataclass(frozen=True)
class PolicyManifest:
    """What policy.json holds."""

    family: str
    policies: dict[str, NamedPolicy]
    state: dict[str, str] = field(default_factory=dict)
    """Files of optimiser, schedule, RNG and objective state, relative to policy.json -> sha256."""
    updates: int = 0
    """Optimiser updates since the warm-up."""


def read_manifest(path: Path) -> PolicyManifest:
    """Raises RollwayError when the file is missing, damaged, or of another version."""
    raw = read_json(path, MADE_BY)
    try:
        if raw["version"] != VERSION:
            raise RollwayError(
                f"{path}: version {raw['version']}, this rollway reads {VERSION}; "
                f"rerun {MADE_BY}: `snakemake --force {path}`"
            )
        policies = {name: NamedPolicy(**named) for name, named in raw["policies"].items()}
        return PolicyManifest(raw["family"], policies, dict(raw["state"]), int(raw["updates"]))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RollwayError(f"{path}: not a policy.json ({error!r}); delete it and rerun {MADE_BY}") from error


def write_manifest(path: Path, manifest: PolicyManifest) -> None:
    """Written last, when all the files that it names are in place."""
    write_json(path, {"version": VERSION, **asdict(manifest)})


def digest(path: Path) -> str:
    """16 hex digits of the sha256 of policy.json's bytes: the name of the policy in the tables. Raises RollwayError."""
    try:
        return sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise RollwayError(
            f"{path}: cannot be read ({error.strerror}); rerun {MADE_BY}: `snakemake --force {path}`"
        ) from error


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def folder_files(folder: Path) -> dict[str, str]:
    """Name -> sha256 of every file in `folder`."""
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def named(path: Path, manifest: PolicyManifest, name: str) -> NamedPolicy:
    """Raises RollwayError when the manifest has no policy of that name."""
    if name not in manifest.policies:
        raise RollwayError(f"{path}: has no policy named {name!r}; it holds {sorted(manifest.policies)}")
    return manifest.policies[name]


def verify(path: Path, name: str | None = None, *, state: bool = True) -> PolicyManifest:
    """Checks presence and sha256 of the files of one named policy, or of all and, unless told otherwise, of the state.

    Raises RollwayError naming the first file that is missing or differs, and the stage to rerun.
    """
    manifest = read_manifest(path)
    chosen = manifest.policies if name is None else {name: named(path, manifest, name)}
    for policy in chosen.values():
        if policy.folder is not None:
            check_files(path.parent / policy.folder, policy.files, path)
        elif policy.base is not None:
            check_files(Path(policy.base), policy.files, path)
    if name is None and state:
        check_files(path.parent, manifest.state, path)
    return manifest


def check_files(folder: Path, files: dict[str, str], path: Path, made_by: str = MADE_BY) -> None:
    """Raises RollwayError where a file in `folder` is missing or differs from what `path` recorded (name -> sha256)."""
    for file, expected in sorted(files.items()):
        try:
            found = file_sha256(folder / file)
        except OSError as error:
            raise RollwayError(
                f"{folder / file}: named in {path} but {(error.strerror or 'unreadable').lower()}; "
                f"rerun {made_by}: `snakemake --force {path}` (pruned or deleted weights come back so)"
            ) from error
        if found != expected:
            raise RollwayError(
                f"{folder / file}: its content is not what {path} recorded (truncated or changed); "
                f"rerun {made_by}: `snakemake --force {path}`"
            )
