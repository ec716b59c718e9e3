"""What each token id looks like as text, by the tokenizer beside the policy."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rollway.store.atomic import read_json


class Pieces:
    """Token ids as text, with each tokenizer file read once however many runs share it."""

    def __init__(self, results: Path) -> None:
        self._results = results
        self._tokenizers: dict[bytes, Any] = {}

    def of(self, run: str, info: dict[str, Any], rounds: Iterable[int], ids: Iterable[int]) -> dict[int, str] | None:
        """id -> text for `ids`; None where no tokenizer is found: a model from the hub, or weights pruned."""
        path = find_tokenizer(self._results, run, info, rounds)
        if path is None:
            return None
        content = path.read_bytes()
        if content not in self._tokenizers:
            from tokenizers import Tokenizer

            self._tokenizers[content] = Tokenizer.from_buffer(content)
        tokenizer = self._tokenizers[content]
        return {token: piece(tokenizer, token) for token in sorted(set(ids))}


def piece(tokenizer: Any, token: int) -> str:
    """One token's text. Decoded after itself, because a first token may lose its leading space."""
    alone = tokenizer.decode([token], skip_special_tokens=False)
    twice = tokenizer.decode([token, token], skip_special_tokens=False)
    return str(twice[len(alone) :] if twice.startswith(alone) else alone)


def find_tokenizer(results: Path, run: str, info: dict[str, Any], rounds: Iterable[int]) -> Path | None:
    """The tokenizer.json of a run: in one of its rounds' policies, or in its warm-up."""
    warmup = f"{info.get('warmup')}-s{info.get('seed')}"
    folders = [results / "warmups" / warmup, *(results / run / f"r{round:04d}" for round in sorted(rounds))]
    for folder in folders:
        if not (folder / "policy.json").is_file():
            continue
        for policy in read_json(folder / "policy.json", "the train stage")["policies"].values():
            path = folder / (policy.get("folder") or "") / "tokenizer.json"
            if path.is_file():
                return Path(path)
    return None
