"""Every table of rollway, declared once: columns, types, meaning. Arrow schemas and the docs are made from here."""

from collections.abc import Collection
from dataclasses import dataclass

import pyarrow as pa

SCHEMA_VERSION = 1
DERIVED = "rollway.derived"
"""Key of a rollout file's metadata that says which entry of `rollout.derive` made it; others have none."""
SPAN = "span"
"""Column of a batch that says which tokens of a derived rollout are trained."""


@dataclass(frozen=True)
class Column:
    """One column: its name, Arrow type, what it means, and whether it may be null."""

    name: str
    type: pa.DataType
    meaning: str
    nullable: bool = False


@dataclass(frozen=True)
class Table:
    """One table; `key` names the columns that identify a row."""

    name: str
    meaning: str
    key: tuple[str, ...]
    columns: tuple[Column, ...]
    optional: tuple[Column, ...] = ()
    """Nullable columns of some files alone, after the others."""

    def schema(self, optional: Collection[str] = ()) -> pa.Schema:
        """Of files with these of the optional columns."""
        present = [*self.columns, *(c for c in self.optional if c.name in optional)]
        return pa.schema([pa.field(c.name, c.type, nullable=c.nullable) for c in present])

    def names(self) -> list[str]:
        return [c.name for c in self.columns]

    def scalar_names(self) -> list[str]:
        """Columns that are not lists and not long text: what SQL over many rollouts reads cheaply."""
        return [c.name for c in self.columns if not pa.types.is_nested(c.type) and c.name not in _LONG_TEXT]


_LONG_TEXT = {"text", "messages", "meta", "sampling"}


def _list(item: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", item))


_MEDIA = pa.struct([("kind", pa.string()), ("sha256", pa.string()), ("path", pa.string())])
_SEGMENT = pa.struct([("start", pa.int32()), ("end", pa.int32()), ("author", pa.string()), ("turn", pa.int32())])

_TEACHER = (
    Column(
        "teacher_logprob", _list(pa.float32()), "nats: the teacher's log-prob of each completion token", nullable=True
    ),
    Column("teacher_entropy", _list(pa.float32()), "nats: its entropy over the whole vocabulary", nullable=True),
    Column(
        "teacher_topk_ids",
        _list(_list(pa.int32())),
        "its K likeliest tokens at each position, the likeliest first",
        nullable=True,
    ),
    Column(
        "teacher_topk_logprobs",
        _list(_list(pa.float32())),
        "nats: their log-probs under the full softmax; what is missing to 1 is the tail's probability",
        nullable=True,
    ),
    Column(
        "teacher_prompt_tokens",
        _list(pa.int32()),
        "ids that the teacher reads before the completion, where it has a context of its own",
        nullable=True,
    ),
)
TEACHER_COLUMNS = tuple(column.name for column in _TEACHER)
"""What scorers of kind teacher say of each completion token; null where a rollout has no teacher."""

PROMPTS = Table(
    "prompts",
    "What policies are asked. Shared by all runs.",
    ("prompt_id",),
    (
        Column("prompt_id", pa.string(), "hash of the prompt, or the source's own id"),
        Column("task", pa.string(), "name of the task in the config"),
        Column("split", pa.string(), "train or heldout"),
        Column("messages", pa.string(), "JSON list of {role, content}"),
        Column("prompt_tokens", _list(pa.int32()), "token ids, where the source brings them", nullable=True),
        Column("media", _list(_MEDIA), "images, audio or video that belong to the prompt", nullable=True),
        Column("answer", pa.string(), "reference answer", nullable=True),
        Column("meta", pa.string(), "JSON: wording (format), demonstration, what the source's verifier needs"),
    ),
)

ROLLOUTS = Table(
    "rollouts",
    "What the policy did: one row per completion. Core columns first, then the token payload.",
    ("rollout_id",),
    (
        Column("rollout_id", pa.string(), "unique over all runs, and deterministic"),
        Column("round", pa.int32(), "round that generated it"),
        Column("pass", pa.int32(), "pass within the round"),
        Column("policy", pa.string(), "digest of the policy that wrote it; empty for an expert's solution"),
        Column("policy_round", pa.int32(), "round of that policy (differs from round under lag)"),
        Column("group_id", pa.string(), "rollouts that are compared with each other"),
        Column("prompt_id", pa.string(), "its prompt"),
        Column("sample", pa.int32(), "number within the group"),
        Column("source", pa.string(), "whose it is: policy, teacher, expert, offline, or a name in rollout.derive"),
        Column("finish", pa.string(), "stop, length, or another reason given by the engine"),
        Column("length", pa.int32(), "tokens of the completion"),
        Column("engine", pa.string(), "engine that generated it"),
        Column("sampling", pa.string(), "JSON of the sampling parameters"),
        Column(
            "parent_id",
            pa.string(),
            "rollout it branches from or is derived from, or the stored one it is",
            nullable=True,
        ),
        Column("branch_at", pa.int32(), "token of the parent where it branches", nullable=True),
        Column("episode_id", pa.string(), "episode it is a part of", nullable=True),
        Column("prompt_tokens", _list(pa.int32()), "token ids that were fed"),
        Column("tokens", _list(pa.int32()), "token ids of the completion, end token included"),
        Column(
            "logprobs", _list(pa.float32()), "nats, of the distribution really sampled; NaN where no policy sampled"
        ),
        Column("train_mask", _list(pa.bool_()), "false on tokens that the policy did not write"),
        Column("segments", _list(_SEGMENT), "who wrote which span, by turn"),
        Column("text", pa.string(), "the completion, decoded for people and verifiers; never tokenised again"),
        Column(
            "entropy", _list(pa.float32()), "nats at temperature 1, where rollout.entropy asks for it", nullable=True
        ),
    ),
    optional=(
        Column(
            "train_prompt_tokens",
            _list(pa.int32()),
            "of derived passes: what stands before the completion in training; null: prompt_tokens; empty: the rollout "
            "is never trained on",
            nullable=True,
        ),
        Column(
            "prefix_length",
            pa.int32(),
            "of derived passes: how many of the last prompt_tokens stand in the assistant's turn; null: none do",
            nullable=True,
        ),
    ),
)

SCORES = Table(
    "scores",
    "What a scorer said of a rollout: one file per scorer.",
    ("rollout_id", "scorer"),
    (
        Column("rollout_id", pa.string(), "its rollout"),
        Column("scorer", pa.string(), "name in score.scorers"),
        Column("reward", pa.float64(), "the verdict as a number; 0 where there is an error"),
        Column("components", pa.map_(pa.string(), pa.float64()), "named parts of the verdict"),
        Column("error", pa.string(), "why the scorer failed on this row", nullable=True),
    ),
    optional=(
        *_TEACHER,
        Column("feedback", pa.string(), "what a scorer wrote about the rollout, for a teacher to read", nullable=True),
    ),
)

BATCH = Table(
    "batch",
    "What a round trains on: narrow, points at rollouts.",
    ("rollout_id", "slot"),
    (
        Column("rollout_id", pa.string(), "its rollout, of this round or an earlier one"),
        Column("slot", pa.int32(), "0, or the number of the repeat where the SQL allows repeats"),
        Column("advantage", pa.float64(), "sample-level advantage", nullable=True),
        Column("weight", pa.float64(), "weight of the row in the loss", nullable=True),
        Column("route", pa.string(), "which loss the row gets", nullable=True),
        Column("pair_id", pa.string(), "preference pair it belongs to", nullable=True),
        Column("role", pa.string(), "chosen or rejected", nullable=True),
        Column("token_advantage", _list(pa.float32()), "token-level advantage, where SQL gives one", nullable=True),
        Column("reward", pa.float64(), "the reward the method saw (weighted, shaped)", nullable=True),
        Column("correct", pa.bool_(), "whether the rollout is right, by score.correct", nullable=True),
        Column("group_id", pa.string(), "group, for objectives that need it", nullable=True),
        Column("age", pa.int32(), "rounds since it was generated", nullable=True),
    ),
    optional=(
        Column(
            SPAN,
            pa.string(),
            "where SQL says so, tokens that are trained: completion, or turn (a derived rollout's prefix too)",
            nullable=True,
        ),
        *_TEACHER,
    ),
)

EVALS = Table(
    "evals",
    "Samples on held-out prompts.",
    ("prompt_id", "sample"),
    (
        Column("prompt_id", pa.string(), "its prompt"),
        Column("sample", pa.int32(), "number within the prompt"),
        Column("correct", pa.bool_(), "by score.correct"),
        Column("reward", pa.float64(), "reward of that scorer"),
        Column("length", pa.int32(), "tokens"),
        Column("finish", pa.string(), "stop or length"),
        Column("text", pa.string(), "the completion"),
        Column("answer", pa.string(), "the answer as the scorer read it (for majority votes)"),
        Column("tokens", _list(pa.int32()), "token ids"),
        Column("logprobs", _list(pa.float32()), "nats"),
    ),
    optional=tuple(
        Column(f"revised_{name}", kind, f"of the second answer (evaluate.revise): {meaning}", nullable=True)
        for name, kind, meaning in (
            ("correct", pa.bool_(), "by score.correct"),
            ("reward", pa.float64(), "reward of that scorer"),
            ("length", pa.int32(), "tokens"),
            ("finish", pa.string(), "stop or length"),
            ("text", pa.string(), "the completion"),
            ("answer", pa.string(), "the answer as the scorer read it"),
            ("prompt_tokens", _list(pa.int32()), "ids that were read"),
            ("tokens", _list(pa.int32()), "token ids"),
            ("logprobs", _list(pa.float32()), "nats"),
        )
    ),
)

TEACHER_CHECKS = Table(
    "teacher_checks",
    "What policy and teacher answered when they were compared before a round's training: a row per rollout asked.",
    ("rollout_id", "scorer"),
    (
        Column("rollout_id", pa.string(), "the rollout whose prompt, and whose context, it is"),
        Column("prompt_id", pa.string(), "its prompt"),
        Column("scorer", pa.string(), "the teacher: name in score.scorers, or train.teacher"),
        Column("context", pa.int32(), "number of the context that the teacher read; 0 without any"),
        Column("policy_correct", pa.bool_(), "whether the policy's answer is right, by score.correct"),
        Column("teacher_correct", pa.bool_(), "whether the teacher's is"),
        Column("policy_text", pa.string(), "what the policy answered"),
        Column("teacher_text", pa.string(), "what the teacher answered, after its context"),
        Column("policy_length", pa.int32(), "tokens"),
        Column("teacher_length", pa.int32(), "tokens"),
        Column("teacher_prompt_tokens", _list(pa.int32()), "ids that the teacher read"),
    ),
)

TABLES = {t.name: t for t in (PROMPTS, ROLLOUTS, SCORES, BATCH, EVALS, TEACHER_CHECKS)}
