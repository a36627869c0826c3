"""A decoder with adapters apart from its numbers, which runs hold in their states and share in their base."""

import math

import jax
from flax import nnx
from jax.sharding import NamedSharding

from balora_jax.adapters import LORA_GA, AdapterOffset, AdapterScale, add_adapters
from balora_jax.methods import get_method
from balora_jax.models import Decoder
from balora_jax.settings import Config
from balora_jax.training.state import TrainState, named_key

_FROZEN = AdapterOffset, AdapterScale


class AdaptedModel:
    """The structure of the model of all runs that share everything but their numbers.

    Attributes:
        bare: the parameters of the decoder, without adapters.
        base: the same arrays, under the names that they have below the adapters.
        trained_parameters: how many numbers one run trains.
        targets: what adapters go on, as `add_adapters` takes it.
    """

    def __init__(self, config: Config, decoder: Decoder, sharding: NamedSharding | None = None):
        """Finds the structure; nothing is computed, so that shapes do in the place of the decoder's arrays.

        Args:
            config: of any run.
            decoder: the base.
            sharding: of the residual stream, see `Decoder`.

        Raises:
            ValueError: the targets match nothing or the rank does not fit.
            TypeError: a target is not a layer that adapters go on.
        """
        self._method, self._settings = get_method(config.method), config.adapter
        bare_graph, self.bare = nnx.split(decoder)
        model = nnx.merge(bare_graph, self.bare, copy=True)
        model.sharding = sharding
        self._bare_graph = nnx.graphdef(model)
        self.targets = _targets(config.adapter.targets)
        model = nnx.eval_shape(self.start, self.bare, 0, config.adapter.alpha)
        model.train()
        self._train_graph, *states = nnx.split(model, nnx.LoRAParam, nnx.RngState, _FROZEN, ...)
        model.eval()
        self._eval_graph = nnx.graphdef(model)
        self.base = _below_adapters(self.bare, states[-1])
        self.trained_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(states[0]))

    @property
    def has_pairs(self) -> bool:
        """Whether what is trained holds LoRA pairs."""
        return self._method.has_pairs

    @property
    def starts_from_gradients(self) -> bool:
        """Whether the adapters start where `start_at` puts them."""
        return self._method.initialisation is LORA_GA

    def decoder(self, bare: nnx.State) -> Decoder:
        """Returns the model without adapters, for evaluation."""
        model = nnx.merge(self._bare_graph, bare, copy=True)
        model.eval()
        return model

    def start(self, bare: nnx.State, seed: jax.typing.ArrayLike, alpha: jax.typing.ArrayLike) -> Decoder:
        """Returns the model with fresh adapters.

        Args:
            bare: as the attribute.
            seed: of the run.
            alpha: numerator of the scale.
        """
        model = nnx.merge(self._bare_graph, bare, copy=True)
        add_adapters(
            model,
            targets=self.targets,
            rank=self._settings.rank,
            alpha=alpha,
            scaling=self._method.scaling,
            dropout=self._settings.dropout,
            layer=self._method.layer,
            initialisation=self._method.initialisation,
            rngs=nnx.Rngs(params=named_key(seed, "adapters"), dropout=named_key(seed, "dropout")),
        )
        return model

    def own_parts(self, model: Decoder) -> tuple[nnx.State, ...]:
        """Returns what a run has for itself of a model: what is trained, the random streams, what is frozen."""
        return nnx.state(model, nnx.LoRAParam, nnx.RngState, _FROZEN)

    def __call__(self, state: TrainState, base: nnx.State, *, training: bool = False) -> Decoder:
        """Returns the model of one run.

        Args:
            state: of the run.
            base: as the attribute.
            training: whether there is dropout.
        """
        graph = self._train_graph if training else self._eval_graph
        return nnx.merge(graph, state.adapters, state.random, state.frozen, base, copy=True)


def _targets(names: tuple[str, ...]) -> str | tuple[str, ...]:
    is_pattern = len(names) == 1 and not names[0].replace(".", "").replace("_", "").isalnum()
    return names[0] if is_pattern else names


def _below_adapters(bare: nnx.State, like: nnx.State) -> nnx.State:
    """The variables of a model without adapters under the paths of one with: an adapter holds its layer as `base`."""
    found = dict(nnx.to_flat_state(bare))
    paths = (path for path, _ in nnx.to_flat_state(like))
    return nnx.from_flat_state([(path, found[tuple(part for part in path if part != "base")]) for path in paths])
