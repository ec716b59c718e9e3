"""One stored round of a run: its files (a fork's lie with its parent), and the recipes that are put on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rollway import curation
from rollway.comparison.settings import recipe_settings
from rollway.config.assets import find
from rollway.config.base import deep_merge
from rollway.config.experiment import Experiment
from rollway.config.recipes import Recipe, parse, recipe_mapping, recipe_names
from rollway.config.scorers import ScoreConfig
from rollway.errors import RollwayError
from rollway.store import parquet
from rollway.store.lineage import RUN_FILE, Inherited, inherited, read_runs
from rollway.store.payload import drawn
from rollway.store.tables import DERIVED


@dataclass(frozen=True)
class StoredRound:
    """A round whose rollouts are there."""

    results: Path
    run: str
    round: int
    info: dict[str, Any]
    """The content of run.json; {} for an import."""
    lineage: list[Inherited]
    runs: dict[str, dict[str, Any]]
    """The content of every run.json of the folder."""

    def home(self, stage: str, round: int) -> Path:
        """Folder of the run that holds this stage of this round."""
        for part in self.lineage:
            if (part.run, part.stage) == (self.run, stage) and part.first_round <= round <= part.last_round:
                return self.results / part.home
        return self.results / self.run

    def rollouts(self, round: int) -> list[Path]:
        """Files of all passes of a round; none where the round is not there."""
        return sorted((self.home("rollout", round) / f"r{round:04d}").glob("p[0-9]*/rollouts-*.parquet"))

    def scores(self, round: int, scorer: str) -> list[Path]:
        """Files of one scorer: the run's own where it has some, else those of the run it forks."""
        own = self._score_files(self.results / self.run, round)
        return own.get(scorer) or self._score_files(self.home("score", round), round).get(scorer, [])

    def scorers(self, round: int) -> list[str]:
        """Names of the scorers whose scores of a round are there."""
        folders = {self.results / self.run, self.home("score", round)}
        return sorted({scorer for folder in folders for scorer in self._score_files(folder, round)})

    @staticmethod
    def _score_files(folder: Path, round: int) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(folder.glob(f"r{round:04d}/p[0-9]*/scores/*-[0-9][0-9][0-9].parquet")):
            found.setdefault(path.stem.rpartition("-")[0], []).append(path)
        return found

    def policy(self, round: int) -> Path:
        """policy.json of the policy that has seen `round` rounds of training."""
        if round == 0:
            return self.results / "warmups" / f"{self.info['warmup']}-s{self.info['seed']}" / "policy.json"
        return self.home("train", round - 1) / f"r{round:04d}" / "policy.json"

    def prompts(self) -> Path:
        """The training prompts."""
        return self.results / "tasks" / self.info["task"] / "train.parquet"

    def settings(self) -> dict[str, Any]:
        """The run's recipe as a mapping, as it stands in this round."""
        return recipe_settings(self.info["config"], self.round)

    def rollout_settings(self) -> dict[str, Any]:
        """`rollout` of the run that sampled this round: a fork's parent where the fork inherits the round."""
        home = self.home("rollout", self.round)
        if home.name not in self.runs:
            raise RollwayError(f"{home / RUN_FILE}: missing, and {self.run} forks that run; run the workflow again")
        return dict(recipe_settings(self.runs[home.name]["config"], self.round).get("rollout", {}))


def open_round(results: Path, run: str, round: int, *, imported: bool = False) -> StoredRound:
    """imported: also a run that `rollway import` made, which has rollouts and scores alone.

    Raises RollwayError when the run is unknown or the round has no rollouts.
    """
    runs = read_runs(results)
    known = list(runs)
    if imported:
        known = sorted(
            {*known, *(path.parents[2].name for path in results.glob("*/r[0-9]*/p[0-9]*/rollouts-*.parquet"))}
        )
    if run not in known:
        without = (results / run / "r0000").is_dir() if "/" not in run else False
        made = ", and rollouts that are imported have no policy" if without else ""
        raise RollwayError(f"--run {run}: {results} has no run.json of it{made}; it has {', '.join(known) or 'none'}")
    stored = StoredRound(results, run, round, runs.get(run, {}), inherited(runs), runs)
    if not stored.rollouts(round):
        there = sorted(int(path.name[1:]) for path in (results / run).glob("r[0-9]*"))
        there = [r for r in range(int(stored.info.get("rounds", 1 + max(there, default=0)))) if stored.rollouts(r)]
        told = f"it has rounds {there[0]} to {there[-1]}" if there else "it has none"
        raise RollwayError(f"--round {round}: run {run} has no rollouts of that round; {told}")
    return stored


def check_names(stored: StoredRound, names: Sequence[str], experiment: Experiment | None) -> None:
    """Raises RollwayError for a name that is neither a recipe's nor what the run or the config calls its own."""
    runs = list(experiment.runs) if experiment is not None else [stored.info["name"]]
    for name in names:
        if name in (*runs, *recipe_names()) or own_recipe(stored, name, experiment):
            continue
        if name.endswith(".yaml"):
            find("recipes", name, ".yaml")
            continue
        near = get_close_matches(name, [*recipe_names(), *runs], n=1)
        hint = f"did you mean {near[0]}?" if near else "`rollway recipes` lists them"
        raise RollwayError(f"--recipes {name}: there is no recipe of that name; {hint}")


def recipe_for(stored: StoredRound, name: str, experiment: Experiment | None) -> Recipe:
    """The recipe called `name`, put on the stored rollouts.

    With an experiment, a key of its `runs:` is that run, and any other recipe is set over by its `defaults:`. Without,
    the run's own recipe is as the run has it; any other takes from the run how rollouts are scored and the optimiser,
    and how they are sampled from the run that did it, the method itself being the recipe's. Raises ConfigError.
    """
    if experiment is not None:
        if name in experiment.runs:
            return experiment.settings(name, stored.round)
        shared = {key: value for key, value in experiment.defaults.items() if key in Recipe.model_fields}
        return parse(Recipe, deep_merge(recipe_mapping(name), shared), f"recipe {name} with the config's defaults")
    own = stored.settings()
    if own_recipe(stored, name, None):
        return parse(Recipe, own, f"run {stored.run}")
    rollout = {key: value for key, value in stored.rollout_settings().items() if key in ("sampling", "group")}
    train = {key: value for key, value in own["train"].items() if key in ("optimizer", "micro_tokens")}
    given = {"rollout": rollout, "score": own.get("score", {}), "train": train}
    return parse(Recipe, deep_merge(recipe_mapping(name), given), f"recipe {name} with the settings of {stored.run}")


def own_recipe(stored: StoredRound, name: str, experiment: Experiment | None) -> bool:
    """Whether `name` is what the run itself trains with, so that its stored objective state applies."""
    known = stored.info["name"]
    return name == known if experiment is not None else name in (known, stored.info["recipe"])


def curated(stored: StoredRound, recipe: Recipe) -> tuple[curation.Curated, pa.Table]:
    """What the recipe's SQL makes of the round (and of the earlier rounds it replays), and the batch's rollouts.

    Experts' solutions are not there for a recipe that has no place for them (a ratio of what nobody sampled), nor are
    derived rollouts for one that derives none.
    Raises RollwayError when scores are missing that the recipe reads, or the SQL cannot run.
    """
    oldest = max(0, stored.round - recipe.curate.replay)
    rounds = [r for r in range(oldest, stored.round + 1) if stored.rollouts(r)]
    given = curation.given_values(recipe.curate, round=stored.round, seed=int(stored.info["seed"]))
    score = _read_scorers(recipe, given)
    files = {scorer: [stored.scores(r, scorer) for r in rounds] for scorer in score.scorers}
    for scorer, per_round in files.items():
        absent = [r for r, paths in zip(rounds, per_round, strict=True) if not paths]
        if absent:
            raise RollwayError(f"needs scores of `{scorer}`, which {stored.run} does not have in round {absent[0]}")
    rollouts = [path for r in rounds for path in stored.rollouts(r)]
    if not recipe.rollout.derive:
        rollouts = [path for path in rollouts if DERIVED not in parquet.metadata(path)]
    with TemporaryDirectory(prefix="rollway-compare-") as folder:
        if not recipe.train.objective.places_experts():
            rollouts = [_sampled(path, Path(folder) / f"{n}.parquet") for n, path in enumerate(rollouts)]
        made = curation.curate_files(
            rollouts,
            {scorer: [path for paths in per_round for path in paths] for scorer, per_round in files.items()},
            score,
            recipe.curate,
            round=stored.round,
            prompts=[stored.prompts()],
            given=given,
        )
        return made, drawn(rollouts, made.batch.column("rollout_id"))


def _sampled(path: Path, copy: Path) -> Path:
    """`path`, or where it holds experts' solutions a copy without them."""
    own = pc.not_equal(parquet.read(path, ["source"]).column("source"), "expert")
    if pc.all(own, min_count=0).as_py():
        return path
    parquet.write(copy, parquet.read(path).filter(own), "rollouts")
    return copy


def _read_scorers(recipe: Recipe, given: dict[str, Any]) -> ScoreConfig:
    """The scorers of the reward, of correctness, the teacher, and those that the SQL names."""
    score, named = recipe.score, curation.columns_named(recipe.curate, given)
    wanted = {*score.reward, score.correct, recipe.curate.teacher}
    used = [n for n in score.scorers if n in wanted or named is None or n in named]
    return score.model_copy(update={"scorers": {n: score.scorers[n] for n in used}})
