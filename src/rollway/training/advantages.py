"""Token-level advantages: pure functions of rewards, log-probs and values. N rows, T padded tokens, M the mask."""

from torch import Tensor, float64, nn, where, zeros, zeros_like

LOG_RATIO_CLAMP = 20.0
"""Nats; a safeguard against one absurd log-prob turning a whole batch's returns into infinities."""


def broadcast(advantage: Tensor, mask: Tensor) -> Tensor:
    """The sample-level advantage [N] on every valid token, 0 elsewhere: [N, T]."""
    return advantage[:, None] * mask


def whiten(x: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """(x - mean) / sqrt(var_{ddof=1} + 1e-8) over the valid tokens of the batch, [N, T] -> [N, T].

    Rows of unequal `weight` [N] count by it: (x - mean_w) / (std_w + 1e-8) with the weighted population moments
    (PF-PPO, arXiv 2409.06957, weight mode). Masked tokens get 0. Fewer than two tokens that count give exactly 0.
    """
    values = x[mask].to(float64)
    share = (mask if weight is None else weight[:, None] * mask)[mask].to(float64)
    counted = values[share > 0]
    if counted.numel() < 2 or bool(counted.max() == counted.min()):
        return zeros_like(x)
    weights = share[share > 0]
    if bool((weights == weights[0]).all()):
        scaled = (values - counted.mean()) / (counted.var(correction=1) + 1e-8).sqrt()
    else:
        p = weights / weights.sum()
        mean = (p * counted).sum()
        scaled = (values - mean) / ((p * (counted - mean).square()).sum().sqrt() + 1e-8)
    return zeros_like(x).masked_scatter(mask, scaled.to(x.dtype))


def returns(
    reward: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, *, gamma: float = 1.0, kl: float = 0.01
) -> Tensor:
    """Discounted returns of reward and per-token KL penalty (REINFORCE++, arXiv 2501.03262).

    rho_t = -kl (logp_old - logp_ref) + 1[last valid token] R;  G_t = rho_t + gamma G_{t+1}, where t+1 is the next
    valid token: holes in the mask (tool output) are skipped. reward [N], log-probs and mask [N, T] -> [N, T], 0 where
    masked. `logp_ref` may be None when kl is 0.
    """
    rho = token_rewards(reward, logp_old, logp_ref, mask, kl)
    out = zeros_like(rho)
    running = zeros(len(rho), dtype=rho.dtype, device=rho.device)
    for t in reversed(range(rho.shape[1])):
        running = where(mask[:, t], rho[:, t] + gamma * running, running)
        out[:, t] = running
    return out * mask


def gae(
    reward: Tensor,
    value_old: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl: float = 0.0,
    logp_old: Tensor | None = None,
    logp_ref: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16): (advantage, value targets), [N, T], not whitened.

    delta_t = rho_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  target = A + V. t+1 is the next valid
    token, and the value after the last one is 0. rho as in `returns`. reward [N], value_old and mask [N, T].
    """
    rho = token_rewards(reward, value_old if logp_old is None else logp_old, logp_ref, mask, kl)
    value = value_old.to(rho.dtype)
    out = zeros_like(rho)
    running = zeros(len(rho), dtype=rho.dtype, device=rho.device)
    next_value = running
    for t in reversed(range(rho.shape[1])):
        delta = rho[:, t] + gamma * next_value - value[:, t]
        running = where(mask[:, t], delta + gamma * lam * running, running)
        next_value = where(mask[:, t], value[:, t], next_value)
        out[:, t] = running
    return out * mask, (out + value) * mask


def leave_one_out(
    reward: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, group: Tensor, kl: float
) -> Tensor:
    """RLOO with the KL penalty in the reward (arXiv 2402.14740): [N], 0 for a group of one.

    R'_i - mean of the other R'_j of the group, R'_i = R_i - kl sum_t (logp_old - logp_ref). reward, group [N],
    log-probs and mask [N, T].
    """
    penalty = token_rewards(zeros_like(reward), logp_old, logp_ref, mask, kl).sum(1)
    own = reward.to(penalty.dtype) + penalty
    index = group.unique(return_inverse=True)[1]
    size = index.bincount()
    mean = own.new_zeros(len(size)).index_add(0, index, own) / size
    spread = size / (size - 1).clamp(min=1)
    return where(size > 1, spread, 0.0)[index] * (own - mean[index])


def of_teacher(
    teacher: Tensor,
    logp_old: Tensor,
    logp_ref: Tensor | None,
    mask: Tensor,
    *,
    kappa: float = 1.0,
    extrapolate: float = 1.0,
    gamma: float = 0.0,
    mean: bool = False,
    from_next: bool = False,
) -> Tensor:
    """The reverse KL to a teacher as a reward, and what later tokens earn (arXiv 2604.00626, eq. 6, 7, 9): [N, T].

    r_t = kappa (lam (ln P - ln ref) - (ln Q - ln ref)), lam = `extrapolate`, clamped to +-20 before kappa;
    A_t = r_t + gamma A_{t+1}, t+1 the next valid token; `mean` divides by the discounts' sum; `from_next` is A_{t+1}, 0
    at the end. teacher, log-probs and mask [N, T]; `logp_ref` may be None where lam is 1.
    """
    gap = where(mask, teacher - logp_old, 0.0)
    if extrapolate != 1.0:
        if logp_ref is None:
            raise ValueError("extrapolating past a teacher needs reference log-probs")
        gap = gap + (extrapolate - 1.0) * where(mask, teacher - logp_ref, 0.0)
    reward = kappa * gap.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    out = zeros_like(reward)
    running, count = zeros_like(reward[:, 0]), zeros_like(reward[:, 0])
    for t in reversed(range(reward.shape[1])):
        later = running / count.clamp(min=1.0) if mean else running
        running = where(mask[:, t], reward[:, t] + gamma * running, running)
        count = where(mask[:, t], 1.0 + gamma * count, count)
        out[:, t] = later if from_next else (running / count.clamp(min=1.0) if mean else running)
    return out * mask


def token_rewards(reward: Tensor, logp_old: Tensor, logp_ref: Tensor | None, mask: Tensor, kl: float) -> Tensor:
    """rho [N, T]: the KL penalty on every valid token, and the reward [N] on each row's last valid token."""
    rho = zeros_like(logp_old)
    if kl > 0.0:
        if logp_ref is None:
            raise ValueError("a KL penalty in the reward needs reference log-probs")
        rho = -kl * (logp_old - logp_ref).clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    after = nn.functional.pad(mask[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
    last = mask & (after == 0)
    return where(mask, rho, 0.0) + last * reward.to(rho.dtype)[:, None]
