"""How a model with one output is taught from pairs, the better completion first."""

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rollway.config.base import Strict


class PairTraining(Strict):
    """Updates of a Bradley-Terry loss."""

    epochs: PositiveInt = 1
    """Passes over the training pairs."""
    batch: PositiveInt = 64
    """Pairs per update."""
    lr: PositiveFloat = 1e-5
    """Learning rate after its warm-up (AdamW)."""
    lr_warmup_steps: NonNegativeInt = 0
    """Updates over which the learning rate rises linearly."""
    weight_decay: NonNegativeFloat = 0.0
    """Times the learning rate: what each update takes off every matrix."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradient norm above which gradients are scaled down."""
    centre: NonNegativeFloat = 0.0
    """Weight of the mean of (r_chosen + r_rejected)^2 in the loss, which keeps outputs around 0; 0: off."""
    micro_tokens: PositiveInt = 16384
    """Most tokens (padding included) in one forward and backward; the result does not depend on it."""
    seed: NonNegativeInt = 0
    """Seed of a new head's weights and of the order of the pairs, not of what is held out or swapped."""
