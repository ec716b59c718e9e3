"""Curation: the SQL half of a method."""

from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt

from rollway.config.base import Strict

CURATE_STEPS = ("reward", "filter", "advantage", "weight", "route", "pair", "select")
"""The order in which a method's SQL files run."""

STEP_FOLDERS = {
    "reward": "rewards",
    "filter": "filters",
    "parents": "parents",
    "advantage": "advantages",
    "weight": "weights",
    "route": "routes",
    "pair": "pairs",
    "select": "selects",
}
"""Folder of `workflow/sql/` in which each step's files lie."""


class SqlPart(BaseModel):
    """One SQL file and its parameters: `{sql: ngrpo, r_max: 1.0}`; the file's `-- param` header types them."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    sql: str
    """A name in `workflow/sql/<step>/`, or the path of a `.sql` file of your own."""

    @property
    def params(self) -> dict[str, Any]:
        """What is given for the file's parameters; null takes back what a recipe gives."""
        return {name: value for name, value in (self.model_extra or {}).items() if value is not None}


class CurateConfig(Strict):
    """From scored rollouts to the batch that is trained on."""

    reward: SqlPart | None = None
    """Shapes the reward: rollout_id, reward."""
    filter: SqlPart | None = None
    """Rows to keep: rollout_id."""
    advantage: SqlPart | None = None
    """Sample-level advantage: rollout_id, advantage."""
    weight: SqlPart | None = None
    """Weight of each row: rollout_id, weight, and span where derived rollouts are trained from their prefix on."""
    route: SqlPart | None = None
    """Which loss a row gets: rollout_id, route."""
    pair: SqlPart | None = None
    """Preference pairs: rollout_id, pair_id, role (chosen or rejected)."""
    select: SqlPart | None = None
    """The last choice of rows, after everything else is known: rollout_id (repeats only where the file allows them)."""
    replay: NonNegativeInt = 0
    """Earlier rounds whose scored rollouts are visible to the SQL beside this round's, as rows with age > 0."""
    teacher: str | None = None
    """Scorer of kind teacher whose token-level scores go into the batch, for `train.objective.distill`; None: none."""
    horizon: PositiveInt | None = None
    """Rounds over which `progress`, a parameter that SQL files may declare, rises from 0 to 1."""
