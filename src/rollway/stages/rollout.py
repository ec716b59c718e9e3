"""rollout: prompts and a policy, files of stored completions, or scored rollouts of earlier passes -> completions."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from rollway.config.curation import CurateConfig
from rollway.config.rollouts import Derive, Engine, VllmEngine
from rollway.config.teachers import PolicyTeacher
from rollway.errors import RollwayError
from rollway.runtime import phases
from rollway.runtime.notice import notice, progress
from rollway.runtime.paths import by_scorer
from rollway.runtime.specs import RolloutSpec
from rollway.sampling import prompts as choice
from rollway.sampling.stored import Shelf, StoredRows, lopsided, shelve, take, with_enough
from rollway.store import parquet
from rollway.store.tables import DERIVED, ROLLOUTS

if TYPE_CHECKING:
    from rollway.engines import Served, TeacherShare
    from rollway.engines.base import Completion, Request
    from rollway.policies.causal_lm import Reader


def run(
    spec: RolloutSpec,
    *,
    prompts: Path,
    policy: Path,
    rollouts: Path,
    earlier_rollouts: list[Path],
    earlier_scores: list[Path],
    stored: list[Path],
) -> None:
    """Writes one shard of one pass. A killed job resumes from the parts it had finished.

    stored: with `rollout.engine: {kind: stored}`, the files whose completions stand in for sampled ones.
    """
    from rollway.engines import serving
    from rollway.policies import manifest

    if spec.rollout.derive:
        _derive(spec, prompts, policy, rollouts, earlier_rollouts, earlier_scores)
        return
    asked = parquet.read(prompts, ["prompt_id", "messages", "meta"])
    digest = manifest.digest(policy)
    prompt_ids = asked.column("prompt_id").to_pylist()
    shelf = shelve(stored) if stored else None
    if shelf is not None:
        prompt_ids = _answered(spec, shelf, prompt_ids)
    chosen = _chosen(spec, prompts, prompt_ids, earlier_rollouts, earlier_scores)
    identity = _sampling_identity(spec, chosen, [manifest.file_sha256(path) for path in stored])
    if spec.teacher is not None:
        identity["teacher"] = manifest.digest(Path(spec.teacher))
    key = choice.rollout_key(digest, manifest.file_sha256(prompts), identity)
    groups = choice.groups(key, chosen)
    mine = groups[choice.shard_slice(len(groups), spec.shard, spec.rollout.shards)]
    samples = [(group, sample) for group in mine for sample in range(spec.rollout.group + spec.rollout.experts)]
    if not samples:
        parquet.write(rollouts, ROLLOUTS.schema().empty_table(), "rollouts")
        notice(f"round {spec.round} pass {spec.pass_number}: nothing to do")
        return

    wanted = pa.array(sorted({group.prompt_id for group in mine}))
    asked = asked.filter(pc.is_in(asked.column("prompt_id"), wanted))

    def generate(opened: ExitStack) -> Callable[[list[tuple[choice.Group, int]]], pa.Table]:
        if shelf is not None:
            return _stored_rows(spec, shelf, policy, asked, mine).generate
        served = opened.enter_context(serving(spec.rollout.engine, policy, teacher=_teacher(spec, policy)))
        return _Writer(spec, digest, asked, served).generate

    _in_parts(spec, rollouts, key, samples, generate, {} if stored else {"policy": digest})


def _teacher(spec: RolloutSpec, policy: Path) -> TeacherShare | None:
    """Who has a share in the tokens. Raises RollwayError where its tokenizer is not the policy's."""
    from rollway.engines import TeacherShare
    from rollway.policies import causal_lm
    from rollway.scorers.teacher import check_same, load_teacher

    mix = spec.rollout.mix
    if mix is None:
        return None
    who = "rollout.mix.model"
    found = load_teacher(who, mix.model, Path.cwd(), Path(spec.teacher) if spec.teacher else None)
    assert found is not None
    theirs, ours = causal_lm.reader_of(found), causal_lm.load_reader(policy)
    check_same(who, theirs, ours)
    if ours.vocabulary > theirs.vocabulary:
        raise RollwayError(
            f"{who}: the policy's output layer has {ours.vocabulary} rows and the teacher's {theirs.vocabulary}; what "
            "the policy samples may be an id of its padding, which the teacher cannot read: take a teacher whose "
            "output layer is not smaller"
        )
    return TeacherShare(found, mix.share)


def _derive(
    spec: RolloutSpec, prompts: Path, policy: Path, rollouts: Path, earlier_rollouts: list[Path], scores: list[Path]
) -> None:
    """As `run`, of a derived pass: its prompts are made of rollouts of the passes before it."""
    from rollway.curation import given_values
    from rollway.curation.parents import parents_in_files
    from rollway.engines import serving
    from rollway.policies import causal_lm, manifest
    from rollway.sampling import derived
    from rollway.scorers.teacher import check_same

    assert spec.score is not None
    derive = spec.rollout.derive[0]
    parents = parents_in_files(
        earlier_rollouts,
        by_scorer(scores),
        spec.score,
        spec.reward,
        derive,
        round=spec.round,
        prompts=[prompts],
        given=given_values(CurateConfig(horizon=spec.horizon), round=spec.round, seed=spec.seed),
    )
    author = policy if spec.author is None else Path(spec.author)
    digest = manifest.digest(author)
    decides = derived.identity(derive, parents, derived.sampling_of(spec.rollout, derive))
    identity = {
        **{"seed": spec.seed, "round": spec.round, "pass": spec.pass_number, "version": spec.version},
        **{"engine": spec.rollout.engine.kind, **decides},
    }
    key = choice.rollout_key(digest, manifest.file_sha256(prompts), identity)
    everywhere = derived.places(parents, derive.samples)
    mine = everywhere[choice.shard_slice(len(everywhere), spec.shard, spec.rollout.shards)]
    own = causal_lm.load_reader(policy)
    writes = _room(spec.rollout.engine, causal_lm.load_reader(author, _named(derive, author)))
    longest = derived.sampling_of(spec.rollout, derive).max_tokens
    asked = parquet.read(prompts, ["prompt_id", "task", "messages", "answer", "meta"])
    items, left_out = derived.items(derive, parents, mine, earlier_rollouts, asked, spec.score, own, writes, longest)
    where = f"round {spec.round} pass {spec.pass_number} ({derive.name})"
    for reason, count in left_out.items():
        notice(f"{where}: {count} of {len(mine)} parents have no derived rollouts: {reason}")
    samples = [(item, sample) for item in items for sample in range(derive.samples)]
    if not samples:
        parquet.write(rollouts, ROLLOUTS.schema(derived.ADDED).empty_table(), "rollouts", {DERIVED: derive.name})
        notice(f"{where}: nothing to do")
        return

    def generate(opened: ExitStack) -> Callable[[list[tuple[derived.Item, int]]], pa.Table]:
        served = opened.enter_context(serving(spec.rollout.engine, author, _named(derive, author)))
        if author != policy:
            check_same(f"rollout.derive.{derive.name}.author", served.reader, own, writes=True)
        numbers = {"round": spec.round, "pass_number": spec.pass_number, "policy_round": spec.policy_round}
        return derived.Writer(spec.rollout, derive, served, key=key, digest=digest, seed=spec.seed, **numbers).generate

    _in_parts(spec, rollouts, key, samples, generate, {"policy": digest, DERIVED: derive.name})


def _room(engine: Engine, reader: Reader) -> Reader:
    """The author as its engine serves it, which may have less room than the model."""
    if not isinstance(engine, VllmEngine) or engine.max_model_len is None:
        return reader
    return replace(reader, context=min(engine.max_model_len, reader.context or engine.max_model_len))


def _named(derive: Derive, author: Path) -> str:
    """Which of the author's named policies writes; one that no round has trained is its own average."""
    from rollway.policies import manifest

    name = derive.author.policy if isinstance(derive.author, PolicyTeacher) else "main"
    held = manifest.read_manifest(author)
    return name if name in held.policies or held.updates else "main"


T = TypeVar("T")


def _in_parts(
    spec: RolloutSpec,
    rollouts: Path,
    key: str,
    samples: list[T],
    generator: Callable[[ExitStack], Callable[[list[T]], pa.Table]],
    metadata: dict[str, str],
) -> None:
    """Writes the rows of `samples`, of which a killed job had finished some parts. generator: opens what makes them."""
    parts = [samples[i : i + spec.rollout.part] for i in range(0, len(samples), spec.rollout.part)]
    partial = rollouts.parent / f".partial-{_parts_key(spec, key)}"
    with ExitStack() as opened, progress(f"rollout r{spec.round}", len(samples)) as bar:
        # Where it fails while its first part is written, nothing of it stays.
        opened.callback(_remove_if_empty, partial)
        generate = generator(opened)
        phases.mark("work")
        reached = 0
        for number, part in enumerate(parts):
            path = partial / f"part-{number:05d}.parquet"
            if not path.exists():
                parquet.write(path, generate(part), "rollouts")
            reached += len(part)
            bar.reach(reached, f"part {number + 1}/{len(parts)}" if len(parts) > 1 else "")
    phases.mark("write")
    whole = parquet.read_many([partial / f"part-{number:05d}.parquet" for number in range(len(parts))])
    parquet.write(rollouts, whole, "rollouts", metadata)
    shutil.rmtree(partial, ignore_errors=True)


def _remove_if_empty(partial: Path) -> None:
    with suppress(OSError):
        partial.rmdir()


def _answered(spec: RolloutSpec, shelf: Shelf, prompt_ids: list[str]) -> list[str]:
    """The prompts with a whole group of stored completions; says how many are left out, or are not balanced."""
    enough = with_enough(shelf, prompt_ids, spec.rollout.group)
    if len(enough) < len(prompt_ids):
        notice(f"{len(enough)} of {len(prompt_ids)} train prompts have {spec.rollout.group} stored completions")
    uneven = lopsided(shelf, enough, spec.rollout.group)
    if uneven:
        notice(f"{uneven} of them lack completions in some file, and take more of the others")
    return enough


def _chosen(
    spec: RolloutSpec, prompts: Path, prompt_ids: list[str], rollouts: list[Path], scores: list[Path]
) -> list[str]:
    """Prompts of this pass: the round's block of the endless stream, or, later, what the filter left missing."""
    wanted = spec.rollout.prompts
    if spec.pass_number == 0:
        stream = {"seed": spec.seed, "round": spec.round, "prompts": wanted, "offset": spec.rollout.offset}
        return choice.epoch_block(prompt_ids, **stream)
    from rollway import curation

    assert spec.score is not None and spec.rollout.refill is not None
    until_filter = CurateConfig(reward=spec.reward, filter=spec.filter, horizon=spec.horizon)
    kept = curation.count_groups_in_files(
        rollouts,
        by_scorer(scores),
        spec.score,
        until_filter,
        round=spec.round,
        prompts=[prompts],
        given=curation.given_values(until_filter, round=spec.round, seed=spec.seed),
    )
    missing = round((wanted - kept) * spec.rollout.refill.oversample)
    used = {p for path in rollouts for p in parquet.read(path, ["prompt_id"]).column("prompt_id").to_pylist()}
    further = choice.refill(prompt_ids, used, seed=spec.seed, round=spec.round, need=max(0, missing))
    notice(
        f"round {spec.round} pass {spec.pass_number}: {kept} of {wanted} groups survive the filter,"
        f" {len(further)} further prompts drawn"
    )
    return further


def _stored_rows(
    spec: RolloutSpec, shelf: Shelf, policy: Path, asked: pa.Table, groups: list[choice.Group]
) -> StoredRows:
    from rollway.policies.causal_lm import load_reader

    taken = {g.group_id: take(shelf, g, spec.rollout.group, seed=spec.seed, round=spec.round) for g in groups}
    return StoredRows(shelf, load_reader(policy), asked, taken, round=spec.round, pass_number=spec.pass_number)


class _Writer:
    """Samples parts and turns them into rows."""

    def __init__(self, spec: RolloutSpec, digest: str, asked: pa.Table, served: Served) -> None:
        self.spec, self.digest, self.reader, self.draw = spec, digest, served.reader, served.draw
        self.asked = {row["prompt_id"]: row for row in asked.to_pylist()}
        self.encoded: dict[str, list[int]] = {}
        mix = spec.rollout.mix
        self.sampling = spec.rollout.sampling.model_dump() | ({} if mix is None else {"mix": mix.model_dump()})

    def generate(self, part: list[tuple[choice.Group, int]]) -> pa.Table:
        from rollway.engines.base import Request

        sampled = [(group, sample) for group, sample in part if sample < self.spec.rollout.group]
        requests = [Request(choice.rollout_id(g.group_id, sample), self._tokens(g.prompt_id)) for g, sample in sampled]
        completions = self.draw(
            requests, self.spec.rollout.sampling, seed=self.spec.seed, entropy=self.spec.rollout.entropy
        )
        done = iter(zip(requests, completions, strict=True))
        rows = [
            self._named(group, sample)
            | (self._sampled(*next(done)) if sample < self.spec.rollout.group else self._expert(group.prompt_id))
            for group, sample in part
        ]
        return pa.Table.from_pylist(rows, schema=ROLLOUTS.schema())

    def _named(self, group: choice.Group, sample: int) -> dict[str, Any]:
        return {
            "rollout_id": choice.rollout_id(group.group_id, sample),
            "round": self.spec.round,
            "pass": self.spec.pass_number,
            "policy_round": self.spec.policy_round,
            "group_id": group.group_id,
            "prompt_id": group.prompt_id,
            "sample": sample,
        }

    def _sampled(self, request: Request, done: Completion) -> dict[str, Any]:
        from rollway.policies.causal_lm import decode

        count = len(done.tokens)
        return {
            "policy": self.digest,
            "source": "policy",
            "finish": done.finish,
            "length": count,
            "engine": self.spec.rollout.engine.kind,
            "sampling": json.dumps(self.sampling, sort_keys=True),
            "prompt_tokens": request.prompt_tokens,
            "tokens": done.tokens,
            "logprobs": done.logprobs,
            "train_mask": [True] * count,
            "segments": [{"start": 0, "end": count, "author": "policy", "turn": 0}],
            "text": decode(self.reader, done.tokens),
            "entropy": done.entropy,
        }

    def _expert(self, prompt_id: str) -> dict[str, Any]:
        from rollway.sampling.experts import solution

        return solution(self.asked[prompt_id], self._tokens(prompt_id), self.reader.tokenizer, self.reader.context)

    def _tokens(self, prompt_id: str) -> list[int]:
        from rollway.policies.causal_lm import encode_prompt

        if prompt_id not in self.encoded:
            row = self.asked[prompt_id]
            wording = json.loads(row["meta"])["format"]
            self.encoded[prompt_id] = encode_prompt(self.reader, json.loads(row["messages"]), wording)
        return self.encoded[prompt_id]


def _parts_key(spec: RolloutSpec, key: str) -> str:
    """Names the parts of one shard, which has a folder to itself: one shared by shards would be removed by the first to
    end while others make theirs in it. What the parts hold besides tokens decides too."""
    entropies = "-entropy" if spec.rollout.entropy else ""
    experts = f"-experts{spec.rollout.experts}" if spec.rollout.experts else ""
    return f"{key}-{spec.shard}-of-{spec.rollout.shards}-by-{spec.rollout.part}{entropies}{experts}{_folder_of(spec)}"


def _folder_of(spec: RolloutSpec) -> str:
    """Says when the files of a teacher's own folder were written: parts of before and after a change do not mix."""
    mix = spec.rollout.mix
    if mix is None or mix.model.kind != "huggingface" or not (folder := Path(mix.model.name)).is_dir():
        return ""
    written = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return f"-teacher{sha256(repr(written).encode()).hexdigest()[:12]}"


def _sampling_identity(spec: RolloutSpec, chosen: list[str], stored: list[str]) -> dict[str, Any]:
    """What decides the policy's tokens: not the shards, parts or batch size, nor the experts beside them.

    stored: the digests of the files of stored completions: what they hold decides, not where they lie.
    """
    other = {"shards", "part", "passes", "refill", "entropy", "engine", "experts", "derive"}
    rollout = spec.rollout.model_dump(mode="json", exclude=other)
    return {
        "seed": spec.seed,
        "round": spec.round,
        "pass": spec.pass_number,
        "version": spec.version,
        "chosen": chosen if spec.pass_number else None,
        "engine": spec.rollout.engine.kind,
        "rollout": rollout,
        **({"stored": stored} if stored else {}),
    }
