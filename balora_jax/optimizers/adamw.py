"""AdamW with clipping and a schedule: the optimizer that every adapter method starts from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from balora_jax.settings import OptimizerSettings, Schedule


def learning_rate_schedule(settings: OptimizerSettings, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Returns the learning rate as a function of the number of updates so far.

    Args:
        settings: `learning_rate`, `schedule` and `warmup_steps` are used; the rate may be a traced array.
        steps: number of updates of the whole run, where a decay ends.
    """
    warmup, decay = settings.warmup_steps, max(steps - settings.warmup_steps, 1)

    def rate(count):
        rising = jnp.minimum((count + 1.0) / warmup, 1.0) if warmup else 1.0
        done = jnp.clip((count - warmup) / decay, 0.0, 1.0)
        shapes: dict[Schedule, jax.typing.ArrayLike] = {
            "constant": 1.0,
            "linear": 1.0 - done,
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
        }
        return settings.learning_rate * rising * jnp.asarray(shapes[settings.schedule])

    return rate


def clipped(settings: OptimizerSettings, optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the optimizer behind the clipping by global norm that the settings ask for."""
    if settings.clip_norm is None:
        return optimizer
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)


def adamw(settings: OptimizerSettings, steps: int) -> optax.GradientTransformation:
    """Returns clipping by global norm followed by AdamW.

    Args:
        settings: hyper-parameters; the numbers may be traced arrays.
        steps: number of updates of the whole run.
    """
    rate = learning_rate_schedule(settings, steps)
    tx = optax.adamw(rate, b1=settings.b1, b2=settings.b2, eps=settings.eps, weight_decay=settings.weight_decay)
    return clipped(settings, tx)
