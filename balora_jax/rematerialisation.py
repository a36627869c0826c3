"""What a backward pass keeps of the forward pass, and what it computes again."""

import jax
from jax.ad_checkpoint import checkpoint_name, checkpoint_policies

_KEPT = "kept"

KEEP_NOTHING = checkpoint_policies.nothing_saveable
"""Policy of `jax.checkpoint`: compute everything again from the inputs."""

KEEP_MARKED = checkpoint_policies.save_only_these_names(_KEPT)
"""Policy of `jax.checkpoint`: keep what is marked with `keep`, and of that only what the derivatives need."""


def keep(x: jax.Array) -> jax.Array:
    """Marks what is small or expensive to compute: outputs of products with weights, not what follows entry by entry.

    Without a policy that asks for it, it is the identity.
    """
    return checkpoint_name(x, _KEPT)
