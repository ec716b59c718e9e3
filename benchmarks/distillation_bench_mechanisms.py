"""What single methods of the distillation bench do that GRPO does not, as queries over its runs."""

from method_pages import Mechanism


def _routes(run: str) -> str:
    """Shares of the routes by round, mean over seeds."""
    return f"""
        SELECT round, avg(share) FILTER (route = 'policy') AS policy, avg(share) FILTER (route = 'distill') AS distill,
               avg(share) FILTER (route = 'both') AS both
        FROM routes WHERE regexp_replace(run, '-s[0-9]+$', '') = '{run}' GROUP BY round ORDER BY round
    """


MECHANISMS: dict[str, Mechanism] = {
    "opd": Mechanism(
        "The gap to the teacher closes.",
        "Log-prob of the policy's own tokens minus the teacher's, nats per token: over right and over wrong rollouts.",
        """
        SELECT round, avg(gap) AS gap, avg(right_gap) AS "right rollouts", avg(wrong_gap) AS "wrong rollouts"
        FROM teachers WHERE regexp_replace(run, '-s[0-9]+$', '') = 'opd' GROUP BY round ORDER BY round
        """,
    ),
    "srpo": Mechanism("Which rollouts go to the teacher.", "Share of the batch by round.", _routes("srpo")),
    "scope": Mechanism("Which rollouts go to the teacher.", "Share of the batch by round.", _routes("scope")),
}
