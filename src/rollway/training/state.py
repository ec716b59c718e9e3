"""What training carries from round to round beside the weights: optimiser moments, counters, objective state."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rollway.errors import RollwayError
from rollway.policies.manifest import file_sha256
from rollway.policies.tensor_files import system_errors
from rollway.store.atomic import atomic_folder, read_json, write_json

COUNTERS = "counters.json"
_MADE_BY = "the train stage writes it beside policy.json"


@dataclass(frozen=True)
class TrainState:
    """Everything that makes 3 + 3 updates equal to 6.

    Tensors are keyed `{parameter}/exp_avg` and so on; `objective` is the objective's own (a dual variable, moments).
    """

    seed: int
    updates: int = 0
    """Optimiser steps of the policy so far: where the learning-rate schedule stands."""
    critic_updates: int = 0
    shuffles: int = 0
    """Shuffles drawn so far; the next one is a function of (seed, shuffles) alone."""
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    critic: Mapping[str, Tensor] = field(default_factory=dict)
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    losses: tuple[float, ...] = ()
    """Of the last steps, where `train.guard.loss_spike` compares with them."""
    skipped: int = 0
    """Steps in a row that `train.guard` left out and that may be followed by more."""

    @property
    def steps(self) -> int:
        """Optimiser steps of either model: the critic's include those before the policy moved."""
        return max(self.updates, self.critic_updates)


_TENSORS = ("optimizer", "critic", "objective")
_NUMBERS = ("seed", "updates", "critic_updates", "shuffles")


def save_state(folder: Path, state: TrainState) -> dict[str, str]:
    """Writes `state` as safetensors and JSON into `folder`; returns {folder/file: sha256}, for policy.json."""
    groups = {"optimizer": state.optimizer, "critic": state.critic, "objective": state.objective}
    held = {name: tensors for name, tensors in groups.items() if tensors}
    numbers: dict[str, Any] = {name: getattr(state, name) for name in _NUMBERS}
    numbers |= {"losses": state.losses} if state.losses else {}
    numbers |= {"skipped": state.skipped} if state.skipped else {}
    numbers["tensors"] = {name: sorted(tensors) for name, tensors in held.items()}
    # As a folder: safetensors writes beside its target first, and what it leaves there when it is killed has any name.
    with atomic_folder(folder) as temporary, system_errors():
        for name, tensors in held.items():
            ready = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
            save_file(ready, temporary / f"{name}.safetensors")
        write_json(temporary / COUNTERS, numbers)
    return {f"{folder.name}/{n}": file_sha256(folder / n) for n in [COUNTERS, *(f"{n}.safetensors" for n in held)]}


def load_state(folder: Path) -> TrainState:
    """The state that `save_state` wrote; digests are `policies.manifest.verify`'s business.

    Raises RollwayError that names the file that is missing or damaged.
    """
    path = folder / COUNTERS
    counters = read_json(path, _MADE_BY)
    try:
        numbers = {name: int(counters[name]) for name in _NUMBERS}
        expected = {name: list(counters["tensors"].get(name, [])) for name in _TENSORS}
        losses = tuple(float(loss) for loss in counters.get("losses", ()))
        skipped = int(counters.get("skipped", 0))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RollwayError(f"{path}: damaged ({error!r}); delete it and run the train stage before it again") from error
    tensors = {name: _read(folder / f"{name}.safetensors", keys) for name, keys in expected.items()}
    return TrainState(
        seed=numbers["seed"],
        updates=numbers["updates"],
        critic_updates=numbers["critic_updates"],
        shuffles=numbers["shuffles"],
        optimizer=tensors["optimizer"],
        critic=tensors["critic"],
        objective=tensors["objective"],
        losses=losses,
        skipped=skipped,
    )


def _read(path: Path, keys: list[str]) -> dict[str, Tensor]:
    if not keys:
        return {}
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise RollwayError(f"{path}: missing; run the train stage of the round before again ({_MADE_BY})") from None
    except (SafetensorError, OSError) as error:
        raise RollwayError(f"{path}: damaged ({error}); run the train stage of the round before again") from error
    if sorted(tensors) != keys:
        raise RollwayError(
            f"{path}: holds other tensors than {COUNTERS} beside it names; run the train stage before it again"
        )
    return tensors
