"""Where a completion ends: stop tokens and stop texts."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPARE = 8
"""Tokens decoded beyond those that a stop text can span: a tokenizer may treat the first ones of a text differently."""


class Stopper:
    """Says which rows end with the token just drawn."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], texts: Sequence[str], vocabulary: int):
        self.tokenizer = tokenizer
        # Completions are read without special tokens, as their stored text is: one that is a stop text stops by its id.
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.texts = [text for text in texts if text not in special]
        self.is_stop = np.zeros(vocabulary, dtype=bool)
        self.is_stop[[i for i in (*ids, *(special[t] for t in texts if t in special)) if i < vocabulary]] = True
        self.window = max((len(text.encode()) for text in self.texts), default=0) + _SPARE
        self.may_end_text = np.zeros(vocabulary, dtype=bool)
        if self.texts:
            last = tuple(sorted({text[-1] for text in self.texts}))
            candidates = np.array(_closing_tokens(tokenizer, last), dtype=np.int64)
            self.may_end_text[candidates[candidates < vocabulary]] = True

    def stops(self, drawn: np.ndarray, history: np.ndarray, rows: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """drawn [B]: new tokens, already in `history` [N, T] at rows [B], whose completions have counts [B] tokens."""
        stopped = self.is_stop[drawn]
        if self.texts:
            for k in np.flatnonzero(self.may_end_text[drawn] & ~stopped):
                tail = history[rows[k], max(0, counts[k] - self.window) : counts[k]]
                text = self.tokenizer.decode(
                    tail.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
                stopped[k] = any(stop in text for stop in self.texts)
        return stopped


@lru_cache(maxsize=8)
def _closing_tokens(tokenizer: PreTrainedTokenizerBase, characters: tuple[str, ...]) -> list[int]:
    # A token that is no whole character by itself decodes to the replacement character; it may complete any of them.
    wanted = {*characters, "\ufffd"}
    ids = [[i] for i in range(len(tokenizer))]
    if " " in characters:
        # Some tokenizers drop the space that a text begins with, so a token alone does not show it.
        return [i for (i,) in ids]
    pieces = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [i for i, piece in enumerate(pieces) if not wanted.isdisjoint(piece)]
