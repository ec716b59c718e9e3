"""Tasks: sources of prompts, their wording, their answers, their splits."""

from rollway.tasks.prompts import Prepared, prepare, require_answers

__all__ = ["Prepared", "prepare", "require_answers"]
