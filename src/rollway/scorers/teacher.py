"""A teacher: another model's, or another context's, log-probs of the tokens that the policy wrote, token by token."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from rollway.config.policies import HuggingFacePolicy
from rollway.config.scorers import TeacherScorer
from rollway.config.teachers import HuggingFaceTeacher, LiveModel, PolicyTeacher, TeacherModel
from rollway.errors import RollwayError
from rollway.policies import causal_lm
from rollway.policies.causal_lm import CausalPolicy, Reader
from rollway.policies.layout import Layout
from rollway.policies.logprobs import Row as Fed
from rollway.policies.logprobs import micro_batches
from rollway.policies.manifest import read_manifest
from rollway.policies.top_k import TopK, row_top_k
from rollway.runtime.notice import notice, tick
from rollway.scorers.contexts import Private, Siblings, references, worded
from rollway.scorers.rows import COLUMNS, Row, Verdict, join
from rollway.scorers.run import Needs, check_errors
from rollway.store import parquet
from rollway.store.parquet import conform
from rollway.store.tables import TABLES, TEACHER_COLUMNS

NUMBERS_PER_ROW_GROUP = 2**24
"""Numbers of teacher columns held at once, 64 MiB; a row group of the score file has about as many."""
_TRAINED = "train_prompt_tokens"
SIBLING_COLUMNS = ["rollout_id", "group_id", "sample", "text"]


@dataclass
class Said:
    """Of one rollout: the verdict, and the columns' values, None where it has no teacher."""

    verdict: Verdict
    ids: list[int] | None = None
    """Read before the completion."""
    found: TopK | None = None
    """None of a live teacher, too."""


@dataclass
class _Asked:
    """A row that the teacher reads: ids before the completion, and what is to be said of it."""

    place: int
    ids: list[int]
    row: Row
    trained: NDArray[np.bool_]
    components: dict[str, float] = field(default_factory=dict)


def columns(config: TeacherScorer) -> list[str]:
    """The teacher columns that the scorer's files have."""
    logprob, entropy, ids, logprobs, prompt_tokens = TEACHER_COLUMNS
    read = [prompt_tokens] if config.context else []
    if isinstance(config.model, LiveModel):
        return read
    return [logprob, *([entropy] if config.entropy else []), *([ids, logprobs] if config.top_k else []), *read]


def score_teacher(
    name: str,
    config: TeacherScorer,
    rollouts: Path,
    prompts: pa.Table,
    *,
    needs: Needs,
    policy: Path,
    teacher: Path | None,
    root: Path,
    feedback: Mapping[str, str | None] | None = None,
) -> Iterator[pa.Table]:
    """Tables in the `scores` schema with `columns(config)`, one row per rollout, in order; one is in memory at a time.

    reward: mean log-prob over the tokens that the policy wrote, in nats, 0 where it wrote none. components: `given` (0
    where the rollout has no teacher: its columns are null and its reward is 0), `entropy` (mean), `context` (number of
    the one used, where there are several), `cut` (tokens of the context that did not fit).
    policy: a policy.json of the run, for its tokenizer. teacher: the policy.json of a teacher that is stored here.
    feedback: by rollout_id what a scorer wrote about it, where contexts name it.
    Raises RollwayError when the teacher cannot be loaded, has another tokenizer or vocabulary, or fewer tokens than
    `top_k`, and when more than `max_error_share` of the rows fail.
    """
    who = f"scorer {name}"
    reader = causal_lm.load_reader(policy)
    model = load_teacher(who, config.model, root, teacher)
    known = reader.vocabulary
    if model is not None:
        own, reader = reader, causal_lm.reader_of(model)
        known = check_same(who, reader, own)
    if config.top_k > known:
        raise RollwayError(
            f"score.scorers.{name}.top_k: {config.top_k} is larger than the vocabulary of {known} tokens; lower it"
        )
    context = Context(name, config, reader, rollouts, needs, root, feedback or {})
    failed: list[tuple[str, str | None]] = []
    count = without = 0
    read = [*COLUMNS, "prompt_tokens", "train_mask"]
    read += [_TRAINED] if _TRAINED in parquet.names(rollouts) else []
    for part in _cut(parquet.read_in_parts(rollouts, read), config):
        said = _say(config, model, context, part, join(part, prompts), known)
        failed += [
            (i.as_py(), s.verdict.error) for i, s in zip(part["rollout_id"], said, strict=True) if s.verdict.error
        ]
        count += len(said)
        without += sum(s.ids is None and s.verdict.error is None for s in said)
        yield table(name, config, part["rollout_id"], said)
        tick(len(said), tokens=int(sum(part["length"].to_pylist())))
    check_errors(name, config, count, failed, _of_failed(name, failed))
    if without:
        notice(f"{who}: {without} of {count} rollouts have no teacher: no context has the fields that it names")


def _of_failed(name: str, failed: list[tuple[str, str | None]]) -> pa.Table:
    """Scores of these rows alone: the others' were written part by part, and are gone with the file."""
    columns = {
        "rollout_id": pa.array([rollout for rollout, _ in failed], pa.string()),
        "scorer": pa.array([name] * len(failed), pa.string()),
        "reward": pa.array([0.0] * len(failed), pa.float64()),
        "components": pa.array([[]] * len(failed), pa.map_(pa.string(), pa.float64())),
        "error": pa.array([error for _, error in failed], pa.string()),
    }
    return conform(pa.table(columns), "scores")


def check_same(who: str, teacher: Reader, policy: Reader, *, writes: bool = False) -> int:
    """How many ids the output layers of both have: the first ones, all tokens of the tokenizer among them.

    Models of one tokenizer may have output layers of unequal size, padded to a round number of rows: no token belongs
    to the rows beyond the smaller one. Raises RollwayError where an id does not mean the same to both, and where one
    has fewer rows than the tokenizer has tokens. writes: whether the policy will read what the teacher samples, which
    must then know no more ids than the policy does.
    """
    theirs, ours = teacher.tokenizer.get_vocab(), policy.tokenizer.get_vocab()
    if theirs != ours:
        token = min(t for t in theirs.keys() | ours.keys() if theirs.get(t) != ours.get(t))
        raise RollwayError(
            f"{who}: the teacher's tokenizer is not the policy's: token {token!r} has the id {_id(theirs, token)} in "
            f"the teacher's and {_id(ours, token)} in the policy's; log-probs are compared token by token, so take a "
            "teacher of the same tokenizer, or one that is read as text (kind judge, or its completions as stored "
            "rollouts)"
        )
    both, tokens = min(teacher.vocabulary, policy.vocabulary), max(ours.values(), default=-1) + 1
    sizes = f"{who}: the teacher's output layer has {teacher.vocabulary} rows and the policy's {policy.vocabulary}"
    if both < tokens and teacher.vocabulary != policy.vocabulary:
        raise RollwayError(
            f"{sizes}; they may differ by rows of padding alone, but their tokenizer has {tokens} tokens: take a "
            "teacher of the same vocabulary"
        )
    if writes and teacher.vocabulary > policy.vocabulary:
        raise RollwayError(
            f"{sizes}; what it samples may hold an id of its padding, which the policy cannot read: take an author "
            "whose output layer is not larger"
        )
    return both


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "none"


def load_teacher(who: str, model: TeacherModel, root: Path, teacher: Path | None) -> CausalPolicy | None:
    """The teacher's model; None of a live one. teacher: the policy.json of one that is stored here."""
    match model:
        case LiveModel():
            return None
        case HuggingFaceTeacher() as given:
            local = root / given.name
            name = str(local) if local.is_dir() else given.name
            wanted = HuggingFacePolicy(name=name, revision=given.revision, dtype=given.dtype, attention=given.attention)
            return causal_lm.build(wanted, (), 0)
        case given:
            if teacher is None:
                raise RollwayError(f"{who}: the policy.json of the teacher was not given")
            manifest = read_manifest(teacher)
            named = given.policy if isinstance(given, PolicyTeacher) else "main"
            # A policy that no round has trained has no average yet: it is its own.
            return causal_lm.load(teacher, named if named in manifest.policies or manifest.updates else "main")


class Context:
    """Words contexts for rows: templates, other scorers' rewards, right siblings."""

    def __init__(
        self,
        name: str,
        config: TeacherScorer,
        reader: Reader,
        rollouts: Path,
        needs: Needs,
        root: Path,
        feedback: Mapping[str, str | None],
    ) -> None:
        self.config, self.reader, self._feedback = config, reader, feedback
        self._references = references(f"score.scorers.{name}", [root / file for file in config.references])
        self._scores = {name: needs[name] for name in config.needs}
        self._judge = self._scores[config.needs[0]] if config.needs else None
        self._siblings = None
        if self._judge is not None and any(c.names("sibling") for c in config.context):
            right = {name: reward >= config.threshold for name, reward in self._judge.items()}
            self._siblings = Siblings(parquet.read_in_parts(rollouts, SIBLING_COLUMNS), right)

    def of(self, row: Row, prompt_tokens: Sequence[int]) -> tuple[list[int], dict[str, float]] | None:
        """Ids before the completion's and components; None where the row has no teacher. Raises RollwayError."""
        config = self.config
        private = Private(
            None if self._siblings is None else self._siblings.of(row),
            self._references.get(row.prompt_id),
            None if self._judge is None else self._judge[row.rollout_id] >= config.threshold,
            {name: rewards[row.rollout_id] for name, rewards in self._scores.items()},
            self._feedback.get(row.rollout_id),
        )
        found = worded(config.context, row, private, self.reader, prompt_tokens)
        if found is None:
            return None
        number, ids = found
        components = {"given": 1.0, **({"context": float(number)} if len(config.context) > 1 else {})}
        fitting = self._fitted(ids, len(row.tokens))
        return fitting, components | ({"cut": float(len(ids) - len(fitting))} if len(fitting) < len(ids) else {})

    def _fitted(self, ids: list[int], completion: int) -> list[int]:
        window, most = self.reader.context, self.config.context_tokens
        room = min(len(ids) if window is None else window - completion, len(ids) if most is None else most)
        if len(ids) <= room:
            return ids
        kept = [ids[0]] if ids[0] == self.reader.tokenizer.bos_token_id else []
        if self.config.overlong == "error" or room <= len(kept):
            limits = [f"the teacher's window is {window}"] if window is not None else []
            limits += [f"context_tokens {most}"] if most is not None else []
            raise RollwayError(
                f"context and completion have {len(ids)} + {completion} tokens, {' and '.join(limits)}"
                + ("; shorten the context, or set `overlong: cut`" if self.config.overlong == "error" else "")
            )
        return kept + ids[len(ids) - room + len(kept) :]


def _cut(parts: Iterable[pa.Table], config: TeacherScorer) -> Iterator[pa.Table]:
    """The rows in pieces of a bounded number of teacher values; a long row has a piece of its own."""
    most = max(4 * config.micro_tokens, NUMBERS_PER_ROW_GROUP // (2 + 2 * config.top_k))
    for part in parts:
        start, held = 0, 0
        for n, length in enumerate(part["length"].to_pylist()):
            if n > start and held + length > most:
                yield part.slice(start, n - start)
                start, held = n, 0
            held += length
        yield part.slice(start)


def _say(
    config: TeacherScorer, policy: CausalPolicy | None, context: Context, part: pa.Table, rows: list[Row], known: int
) -> list[Said]:
    """What the teacher says of the rows, in order; of a live one (`policy` is None) what it will read.

    known: number of ids that its distribution is over, the policy's; rows of padding beyond them have no mass.
    """
    said: list[Said] = []
    asked: list[_Asked] = []
    prompt_tokens, masks = _trained_prompts(part), part["train_mask"].to_pylist()
    for n, row in enumerate(rows):
        prompt = prompt_tokens[n]
        if prompt is None:
            said.append(Said(Verdict(0.0, {"given": 0.0})))
            continue
        try:
            found = context.of(row, prompt)
        except RollwayError as error:
            said.append(Said(Verdict.failed(str(error))))
            continue
        if found is None:
            said.append(Said(Verdict(0.0, {"given": 0.0})))
            continue
        if (largest := max(row.tokens, default=0)) >= known:
            said.append(Said(Verdict.failed(f"the completion has the id {largest}, and the teacher knows {known}")))
            continue
        said.append(Said(Verdict(1.0, found[1]), found[0]))
        asked.append(_Asked(n, found[0], row, np.array(masks[n], dtype=np.bool_), found[1]))
    if policy is None:
        return said
    for empty in (a for a in asked if not a.row.tokens):
        said[empty.place] = _of_nothing(empty, config.top_k)
    asked = [a for a in asked if a.row.tokens]
    sequences = [Fed(a.ids, a.row.tokens) for a in asked]
    layout = Layout.of(policy.model, config.micro_tokens)
    for batch in micro_batches(sequences, layout):
        some = [sequences[i] for i in batch]
        tops = row_top_k(
            policy.model, some, config.top_k, temperature=config.temperature, packed=layout.packed, vocabulary=known
        )
        for i, top in zip(batch, tops, strict=True):
            said[asked[i].place] = _judged(asked[i], top)
    return said


def _trained_prompts(part: pa.Table) -> list[list[int] | None]:
    """Ids before the completion in training: of a derived rollout they may be others than the engine read, and None
    where it is never trained on."""
    read = part["prompt_tokens"].to_pylist()
    if _TRAINED not in part.column_names:
        return read
    trained = part[_TRAINED].to_pylist()
    return [own if other is None else other or None for own, other in zip(read, trained, strict=True)]


def _of_nothing(asked: _Asked, k: int) -> Said:
    """Of a completion without a token: columns of no entry, and 0 for its means. It stays a row of its batch, and means
    over rows with `empty: zero` count it as 0 (arXiv 2604.00626, eq. 1)."""
    none = torch.zeros(0)
    found = TopK(none, none, torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k))
    return Said(Verdict(0.0, {**asked.components, "entropy": 0.0}), asked.ids, found)


def _judged(asked: _Asked, found: TopK) -> Said:
    """Means over the tokens that the policy wrote; over all of them where it wrote none."""
    chosen = asked.trained if asked.trained.any() else np.ones_like(asked.trained)
    values = TopK(*(x.cpu() for x in (found.logp, found.entropy, found.ids, found.logprobs)))
    reward, entropy = (float(x.double().numpy()[chosen].mean()) for x in (values.logp, values.entropy))
    verdict = Verdict(reward, {**asked.components, "entropy": entropy}).checked()
    return Said(verdict) if verdict.error else Said(verdict, asked.ids, values)


def table(name: str, config: TeacherScorer, ids: pa.ChunkedArray, said: list[Said]) -> pa.Table:
    verdicts = [s.verdict for s in said]
    schema = TABLES["scores"].schema(columns(config))
    core = {
        "rollout_id": ids,
        "scorer": pa.repeat(pa.scalar(name), len(said)),
        "reward": pa.array([v.reward for v in verdicts], pa.float64()),
        "components": pa.array([sorted(v.components.items()) for v in verdicts], pa.map_(pa.string(), pa.float64())),
        "error": pa.array([v.error for v in verdicts], pa.string()),
    }
    made = {column: _lists(column, schema.field(column).type, said, config.top_k) for column in columns(config)}
    return pa.table({**core, **made})


def _lists(column: str, kind: pa.DataType, said: list[Said], k: int) -> pa.Array:
    """A teacher column: a list for each rollout, null where it has no teacher."""
    if column == "teacher_prompt_tokens":
        return pa.array([s.ids for s in said], kind)
    held = [s.found for s in said if s.found is not None]
    lengths = np.array([0 if s.found is None else len(s.found.logp) for s in said], dtype=np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    missing = pa.array([s.found is None for s in said], pa.bool_())
    return pa.ListArray.from_arrays(offsets, _values(column, held, k), type=kind, mask=missing)


def _values(column: str, held: list[TopK], k: int) -> pa.Array:
    """All tokens of a teacher column, one after another: a number each, or K of them."""
    match column:
        case "teacher_logprob":
            return pa.array(_flat([f.logp.numpy() for f in held], np.float32))
        case "teacher_entropy":
            return pa.array(_flat([f.entropy.numpy() for f in held], np.float32))
        case "teacher_topk_ids":
            return _by_token(_flat([f.ids.numpy().ravel() for f in held], np.int32), k)
        case _:
            return _by_token(_flat([f.logprobs.numpy().ravel() for f in held], np.float32), k)


def _flat(arrays: list[np.ndarray], dtype: type) -> NDArray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)


def _by_token(values: NDArray, k: int) -> pa.Array:
    """[n K] as n lists of K."""
    offsets = pa.array(np.arange(0, len(values) + 1, k, dtype=np.int32))
    item = pa.field("element", pa.int32() if values.dtype == np.int32 else pa.float32())
    return pa.ListArray.from_arrays(offsets, pa.array(values), type=pa.list_(item))
