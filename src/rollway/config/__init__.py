"""Configuration as pydantic models. Imports no torch: the Snakefile imports this package."""

from rollway.config.base import ConfigError, deep_merge
from rollway.config.curation import CurateConfig, SqlPart
from rollway.config.experiment import Experiment, RunConfig, load_experiment
from rollway.config.objectives import Objective
from rollway.config.recipes import Recipe, load_recipe, recipe_names
from rollway.config.rollouts import RolloutConfig
from rollway.config.scorers import ScoreConfig
from rollway.config.tasks import TaskConfig
from rollway.config.training import TrainConfig

__all__ = [
    "ConfigError",
    "CurateConfig",
    "Experiment",
    "Objective",
    "Recipe",
    "RolloutConfig",
    "RunConfig",
    "ScoreConfig",
    "SqlPart",
    "TaskConfig",
    "TrainConfig",
    "deep_merge",
    "load_experiment",
    "load_recipe",
    "recipe_names",
]
