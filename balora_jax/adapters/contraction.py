"""How a linear layer contracts its input with its kernel, in the one language that covers all: an einsum."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from balora_jax.platforms import with_choice
from balora_jax.rematerialisation import keep

_RANK = "R"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Contraction:
    """The einsum `inputs, kernel -> outputs` of a layer and the shapes of a low-rank update of its kernel.

    The kernel's axes are of three kinds: contracted (in the inputs and not in the outputs), remaining (in the outputs
    and not in the inputs) and shared (in both: a batch of matrices, such as experts). `lora_a` of the update has
    axes `(shared, contracted, r)`, and `lora_b` has `(shared, r, remaining)`.

    Attributes:
        inputs: labels of the input, which may start with an ellipsis.
        kernel: labels of the kernel.
        outputs: labels of the output.
        input_axes: the axes of the input that must be moved to its end first, in ascending order, or None.
    """

    inputs: str
    kernel: str
    outputs: str
    input_axes: tuple[int, ...] | None = None

    @property
    def contracted(self) -> str:
        """Labels that the layer sums over."""
        return "".join(c for c in self.kernel if c in self.inputs and c not in self.outputs)

    @property
    def remaining(self) -> str:
        """Labels that only the kernel brings to the output."""
        return "".join(c for c in self.kernel if c not in self.inputs)

    @property
    def shared(self) -> str:
        """Labels of the kernel that input and output share."""
        return "".join(c for c in self.kernel if c in self.inputs and c in self.outputs)

    def factor_shapes(self, kernel_shape: tuple[int, ...], rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the shapes of the two factors; leading axes of the kernel beyond its labels stack layers."""
        stacked = kernel_shape[: len(kernel_shape) - len(self.kernel)]
        size = dict(zip(self.kernel, kernel_shape[len(stacked) :], strict=True))
        shared, contracted, remaining = (
            tuple(size[c] for c in labels) for labels in (self.shared, self.contracted, self.remaining)
        )
        return (*stacked, *shared, *contracted, rank), (*stacked, *shared, rank, *remaining)

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """Returns a kernel as matrices `(stacked, shared, contracted, remaining)`, the axes of each kind made one."""
        axes = jnp.einsum(f"...{self.kernel}->...{self.shared}{self.contracted}{self.remaining}", kernel)
        batch = axes.ndim - len(self.contracted) - len(self.remaining)
        size = math.prod(axes.shape[batch : batch + len(self.contracted)])
        return axes.reshape(*axes.shape[:batch], size, -1)

    def low_rank(self, x: jax.Array, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
        """Applies the update to an input without forming it: first `lora_a`, then `lora_b`."""
        if self.input_axes is not None:
            axes = sorted(axis % x.ndim for axis in self.input_axes)  # the order in which flax contracts them
            x = jnp.moveaxis(x, axes, range(-len(axes), 0))
        # The factor with its rank in front, behind a barrier that its gradient meets too: XLA would make the gradient
        # the product x^T g, which takes up to ten times as long on CPUs as g^T x.
        lora_a = jax.lax.optimization_barrier(jnp.moveaxis(lora_a, -1, len(self.shared)))
        hidden = "".join(c for c in self.inputs if c not in self.contracted) + _RANK
        x = _product(f"{self.inputs},{self.shared}{_RANK}{self.contracted}->{hidden}", x, lora_a)
        return _product(f"{hidden},{self.shared}{_RANK}{self.remaining}->{self.outputs}", keep(x), lora_b)

    def scaled_outputs(self, y: jax.Array, factors: jax.Array) -> jax.Array:
        """Multiplies every output unit by its factor `(shared, remaining axes)`."""
        return jnp.einsum(f"{self.outputs},{self.shared}{self.remaining}->{self.outputs}", y, factors)

    def scaled_kernel(self, kernel: jax.Array, factors: jax.Array) -> jax.Array:
        """Multiplies the kernel's column of every output unit by its factor, stacked axes first."""
        return jnp.einsum(f"...{self.kernel},...{self.shared}{self.remaining}->...{self.kernel}", kernel, factors)

    def product(self, lora_a: jax.Array, lora_b: jax.Array) -> jax.Array:
        """Returns the update in the kernel's layout, stacked axes first."""
        return jnp.einsum(
            f"...{self.shared}{self.contracted}{_RANK},...{self.shared}{_RANK}{self.remaining}->...{self.kernel}",
            lora_a,
            lora_b,
            precision=jax.lax.Precision.HIGHEST,
        )


def _product(subscripts: str, x: jax.Array, factor: jax.Array) -> jax.Array:
    """The einsum of an input and a factor. On CPUs the leading axes of the input are made one: over several XLA sums
    the gradient of the factor at a fifth to a half of the speed."""

    def product(merged, x, factor):
        leading = x.shape[:merged]
        y = jnp.einsum(subscripts, x.reshape(-1, *x.shape[merged:]) if merged else x, factor)
        return y.reshape(*leading, *y.shape[1:]) if merged else y

    return with_choice(product, x, factor, cpu=_mergeable_axes(subscripts, x), default=0)


def _mergeable_axes(subscripts: str, x: jax.Array) -> int:
    """How many leading axes of the first operand can be made one: those of the ellipsis, unless one behind the first is
    sharded."""
    inputs, outputs = subscripts.split(",")[0], subscripts.split("->")[1]
    count = x.ndim - len(inputs.removeprefix("..."))
    in_front = inputs.startswith("...") and outputs.startswith("...")
    return count if count > 1 and in_front and not any(jax.typeof(x).sharding.spec[1:count]) else 0


def contraction_of(layer: nnx.Module) -> Contraction:
    """Returns the contraction of a supported layer.

    Args:
        layer: an `nnx.Linear`, `nnx.LinearGeneral` or `nnx.Einsum`.

    Raises:
        TypeError: another kind of layer.
        ValueError: a `LinearGeneral` with batch axes, or an `Einsum` whose equation is not fixed or not one that a
            low-rank update can follow.
    """
    if isinstance(layer, nnx.Linear):
        return Contraction("...a", "ab", "...b")
    if isinstance(layer, nnx.LinearGeneral):
        if layer.batch_axis:
            raise ValueError(f"a LinearGeneral with batch_axis is not supported, got {dict(layer.batch_axis)}")
        n_in, n_out = len(layer.in_features), len(layer.out_features)
        into, out = _LETTERS[:n_in], _LETTERS[n_in : n_in + n_out]
        axes = tuple(layer.axis)
        trailing = sorted(axes) == list(range(-n_in, 0))
        return Contraction(f"...{into}", into + out, f"...{out}", None if trailing else axes)
    if isinstance(layer, nnx.Einsum):
        equation = layer.einsum_str
        if not equation:
            raise ValueError("an Einsum layer must have its einsum_str from the constructor, got None")
        operands, outputs = equation.replace(" ", "").split("->")
        inputs, kernel = operands.split(",")
        found = Contraction(inputs, kernel, outputs)
        if not found.contracted or not found.remaining or "." in kernel or _RANK in equation:
            raise ValueError(
                f"an Einsum layer must sum over an axis of its kernel and keep another, with plain labels in the "
                f"kernel and without the label {_RANK}, got {equation!r}"
            )
        return found
    raise TypeError(f"adapters go on nnx.Linear, nnx.LinearGeneral and nnx.Einsum, got {type(layer).__name__}")
