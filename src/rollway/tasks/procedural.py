"""Datasets of `reasoning_gym`: seeded entries, kept as JSON such that their own verifiers can be called later."""

from difflib import get_close_matches
from typing import Any

from rollway.config.tasks import ReasoningGymSource
from rollway.errors import RollwayError


def reasoning_gym_entries(source: ReasoningGymSource) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Entries 0 to size - 1 of a dataset, each with the meta that `Verifiers` takes (dataset, params, entry as JSON).

    Entry i depends on seed + i only, so the streams of two near seeds overlap. Importing `reasoning_gym` takes 2 s.
    Raises RollwayError on unknown names (near ones are suggested) and parameters.
    """
    dataset = create(source.dataset, {**source.params, "seed": source.seed, "size": source.size})
    pairs = []
    for index in range(source.size):
        entry = dataset[index]
        meta = {"dataset": source.dataset, "params": source.params, "entry": to_json(entry)}
        pairs.append((entry, meta))
    return pairs


def to_json(value: Any) -> Any:
    """JSON form of an entry that keeps tuples, sets and non-text keys apart, as `{"$tuple": [...]}` and the like.

    Some verifiers compare with ==, and a tuple never equals the list that plain JSON would make of it.
    """
    match value:
        case tuple():
            return {"$tuple": [to_json(v) for v in value]}
        case list():
            return [to_json(v) for v in value]
        case set() | frozenset():
            return {"$set": sorted((to_json(v) for v in value), key=repr)}
        case dict() if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: to_json(v) for key, v in value.items()}
        case dict():
            return {"$dict": [[to_json(k), to_json(v)] for k, v in value.items()]}
        case str() | bool() | int() | float() | None:
            return value
        case _:
            # Verifiers that need such objects build them anew from the entry's texts; the text is for the reader.
            return str(value)


def from_json(value: Any) -> Any:
    """Inverse of `to_json`."""
    match value:
        case {"$tuple": items}:
            return tuple(from_json(v) for v in items)
        case {"$set": items}:
            return {from_json(v) for v in items}
        case {"$dict": items}:
            return {from_json(k): from_json(v) for k, v in items}
        case dict():
            return {key: from_json(v) for key, v in value.items()}
        case list():
            return [from_json(v) for v in value]
        case _:
            return value


def create(name: str, params: dict[str, Any]) -> Any:
    """A dataset. Raises RollwayError on unknown names and parameters."""
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, n=3, cutoff=0.5) or sorted(DATASETS)
        raise RollwayError(f"reasoning_gym has no dataset {name!r}; did you mean {', '.join(near)}?")
    known = list(DATASETS[name][1].__dataclass_fields__)
    unknown = [key for key in params if key not in known]
    if unknown:
        raise RollwayError(f"reasoning_gym {name}: unknown params {unknown}; there are {', '.join(known)}")
    try:
        if name == "composite":
            params = {**params, "datasets": [DatasetSpec(**each) for each in params.get("datasets", [])]}
        return reasoning_gym.create_dataset(name, **params)
    except (AssertionError, TypeError, ValueError) as error:
        raise RollwayError(f"reasoning_gym {name}: refuses its params ({error or type(error).__name__})") from error
