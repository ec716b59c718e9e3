"""What each of the ten systems does that GRPO does not, as a query over the runs of the methods bench."""

from method_pages import Mechanism


def _means(runs: tuple[str, ...], columns: dict[str, str], stage: str = "train") -> str:
    """Means over seeds, rounds and steps of some metrics, a row per run."""
    chosen = ", ".join(f"avg(value) FILTER (name = '{metric}') AS \"{label}\"" for label, metric in columns.items())
    names = ", ".join(f"'{run}'" for run in runs)
    return (
        f"SELECT regexp_replace(run, '-s[0-9]+$', '') AS run, {chosen} FROM metrics "
        f"WHERE stage = '{stage}' AND regexp_replace(run, '-s[0-9]+$', '') IN ({names}) GROUP BY 1 ORDER BY 1"
    )


MECHANISMS = {
    "copg": Mechanism(
        "The pair loss pulls towards the reference; policy gradients do not.",
        "Margin: mean of d(y) - d(y'), nats per pair, over the last four rounds.",
        """
        SELECT regexp_replace(run, '-s[0-9]+$', '') AS run,
               avg(value) FILTER (name = 'preference/margin') AS "margin, nats",
               avg(value) FILTER (name = 'kl_reference') AS "KL to the reference, nats per token"
        FROM metrics
        WHERE regexp_replace(run, '-s[0-9]+$', '') IN ('copg', 'dpo', 'ipo') AND round >= 9
        GROUP BY 1 ORDER BY 1
        """,
    ),
    "r2vpo": Mechanism(
        "Return at equal rollouts, with and without replay.",
        "`r2vpo-fresh` is the same recipe without replayed rounds.",
        """
        WITH last AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm, avg(pass_1) AS pass_1
            FROM learning WHERE round = 12 GROUP BY 1
        ), drawn AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm, count(*) / count(DISTINCT run) AS rollouts
            FROM seen_rollouts GROUP BY 1
        ), said AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm,
                   avg(value) FILTER (name = 'batch_replayed_share') AS replayed,
                   avg(value) FILTER (name = 'ratio/variance') AS variance,
                   avg(value) FILTER (name = 'variance/lam' AND round = 11) AS lam
            FROM metrics GROUP BY 1
        )
        SELECT arm AS run, rollouts::DOUBLE AS "rollouts per seed", replayed AS "replayed share of the batch",
               variance AS "variance of the ratio", lam AS "lam in the last round", pass_1 AS "held-out pass@1"
        FROM last JOIN drawn USING (arm) JOIN said USING (arm)
        WHERE arm IN ('r2vpo', 'r2vpo-fresh') ORDER BY arm
        """,
    ),
    "dagrpo": Mechanism(
        "Rollouts that the judge cannot tell apart are not trained on.",
        "Shares over all rounds; the anchor is the expert's solution in groups that mostly fail.",
        _means(
            ("dagrpo",),
            {
                "right rollouts masked": "zero_advantage_above_share",
                "wrong rollouts masked": "zero_advantage_below_share",
                "anchors masked": "zero_advantage_expert_share",
                "groups masked whole": "zero_advantage_groups_share",
            },
            "curate",
        ),
    ),
    "dcpo": Mechanism(
        "Entropy beside its target of 0.4.",
        "Entropy of the policy before each round, nats per token, mean over seeds, and the regulariser's alpha.",
        """
        SELECT round, avg(value) FILTER (run LIKE 'grpo-s%' AND name = 'entropy_old') AS grpo,
               avg(value) FILTER (run LIKE 'dcpo-s%' AND name = 'entropy_old') AS dcpo,
               avg(value) FILTER (run LIKE 'dcpo-s%' AND name = 'mixing/alpha') AS alpha
        FROM metrics WHERE round IN (0, 3, 6, 9, 11) GROUP BY round ORDER BY round
        """,
    ),
    "d3s": Mechanism(
        "Few tokens are trained on, and all of them carry a signal.",
        "Per seed, over all rounds.",
        """
        WITH kept AS (
            SELECT run, sum(value) FILTER (name = 'tokens') AS tokens, sum(value) FILTER (name = 'kept_tokens') AS kept
            FROM metrics WHERE stage = 'train' GROUP BY run
        ), useful AS (
            SELECT run, avg(value) AS useful FROM metrics WHERE name = 'advantage_nonzero_share' GROUP BY run
        )
        SELECT regexp_replace(run, '-s[0-9]+$', '') AS run, avg(tokens) AS "tokens of the rows trained on",
               avg(coalesce(kept, tokens)) AS "tokens trained on", avg(useful) AS "rows with an advantage"
        FROM kept JOIN useful USING (run)
        WHERE regexp_replace(run, '-s[0-9]+$', '') IN ('grpo', 'd3s', 'd3s-gspo') GROUP BY 1 ORDER BY 1
        """,
    ),
    "pf-ppo": Mechanism(
        "The reward model's word for what is trained on, and the truth.",
        "`ppo-rm` is PPO on the same reward model without a filter. True quality is the share of right digits. Means "
        "over the last four rounds; the batch's reward is weighted as the loss is.",
        """
        WITH quality AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm,
                   avg(value) FILTER (name = 'score_rm_mean') AS policy,
                   avg(value) FILTER (name = 'batch_reward_weighted_mean') AS weighted,
                   avg(value) FILTER (name = 'batch_reward_mean') AS plain,
                   avg(value) FILTER (name = 'score_share_mean') AS truth,
                   avg(value) FILTER (name = 'score_exact_mean') AS right_share
            FROM metrics WHERE stage = 'curate' AND round >= 8 GROUP BY 1
        )
        SELECT arm AS run, policy AS "reward model on the rollouts",
               coalesce(weighted, plain) AS "on what is trained on",
               truth AS "true quality", right_share AS "wholly right"
        FROM quality WHERE arm IN ('pf-ppo', 'ppo-rm') ORDER BY arm
        """,
    ),
    "ngrpo": Mechanism(
        "All-wrong groups carry a signal.",
        "Means over all rounds.",
        _means(
            ("grpo", "ngrpo"),
            {
                "groups with both right and wrong": "groups_with_signal_share",
                "groups without a right one": "groups_none_correct",
                "rows of the batch with an advantage": "advantage_nonzero_share",
                "mean advantage": "advantage_mean",
            },
            "curate",
        ),
    ),
    "sapo": Mechanism(
        "Tokens are damped where GRPO would silence them.",
        "Means over all updates.",
        _means(
            ("sapo",),
            {
                "mean weight, A > 0": "soft/weight_positive",
                "mean weight, A < 0": "soft/weight_negative",
                "1st percentile of the weight": "soft/weight_p01",
                "share that a clip of 0.2 would silence": "soft/grpo_clip_share",
            },
        ),
    ),
    "capo": Mechanism(
        "A few tokens are rejected, and an aggressive learning rate.",
        "`-hot` runs have five times the bench's learning rate. Rejected: share of tokens, mean over updates; pass@1 "
        "at the end, and its worst seed.",
        """
        WITH kept AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm,
                   1 - avg(value) FILTER (name = 'kept_share' AND stage = 'train') AS rejected,
                   avg(value) FILTER (name = 'kl_old') AS kl
            FROM metrics GROUP BY 1
        ), last AS (
            SELECT regexp_replace(run, '-s[0-9]+$', '') AS arm, avg(pass_1) AS mean, min(pass_1) AS worst
            FROM learning WHERE round = 12 GROUP BY 1
        )
        SELECT arm AS run, rejected, kl AS "KL to the policy of the round", mean AS "pass@1", worst AS "worst seed"
        FROM kept JOIN last USING (arm) WHERE arm IN ('grpo', 'capo', 'grpo-hot', 'capo-hot') ORDER BY arm
        """,
    ),
    "fiberpo": Mechanism(
        "Trajectories by regime, and tokens whose residual is clipped.",
        "Means over all updates: rows of a mini-batch of 64 or so.",
        _means(
            ("fiberpo",),
            {
                "rows passed": "fibre/rows_passed",
                "one side rolled back": "fibre/rows_one_rolled_back",
                "one side zeroed": "fibre/rows_one_zeroed",
                "both rolled back": "fibre/rows_both_rolled_back",
                "both zeroed": "fibre/rows_both_zeroed",
                "residuals clipped": "fibre/clipped_share",
            },
        ),
    ),
}
