"""Curation: runs the SQL half of a method on scored rollouts."""

from rollway.curation.curate import (
    Curated,
    columns_named,
    count_groups,
    count_groups_in_files,
    curate,
    curate_files,
    curate_into,
    given_values,
    plan,
    reads_reward,
    scorers_read,
    takes_progress,
)
from rollway.curation.dry_run import dry_run
from rollway.curation.faults import fault_shares
from rollway.curation.method import check_method
from rollway.curation.scored import scored_relation
from rollway.curation.sql_file import sql_paths
from rollway.curation.summary import summary
from rollway.curation.teacher import Teacher

__all__ = [
    "Curated",
    "Teacher",
    "check_method",
    "columns_named",
    "count_groups",
    "count_groups_in_files",
    "curate",
    "curate_files",
    "curate_into",
    "dry_run",
    "fault_shares",
    "given_values",
    "plan",
    "reads_reward",
    "scored_relation",
    "scorers_read",
    "sql_paths",
    "summary",
    "takes_progress",
]
