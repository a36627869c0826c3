"""The adapters of a decoder to PEFT's form and back: stacked layers become modules one by one."""

import difflib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from balora_jax.adapters.adalora import AdaLoRALinear
from balora_jax.adapters.dora import DoRALinear
from balora_jax.adapters.lora import LoRALinear, Scaling
from balora_jax.adapters.model import add_adapters, iter_adapters
from balora_jax.adapters.peft import CONFIG_FILE, PARTS, TENSOR_FILE, PeftAdapter, PeftModule, from_modules, tensor_name
from balora_jax.casting import check_cast, largest, too_large
from balora_jax.models import Decoder

_LOW_RANK = LoRALinear, DoRALinear, AdaLoRALinear


def export_adapters(model: Decoder, *, scaling: Scaling = "lora", base: str | None = None) -> PeftAdapter:
    """Returns the adapters of a decoder as PEFT keeps them.

    Adapters that started with a product in the place of part of the weight (PiSSA, OLoRA, LoRA-GA, LORO) become LoRA of
    rank 2 r on the original weight, `A B - A0 B0 = [A, A0] [B; -B0]`, as PEFT itself converts them. AdaLoRA becomes
    LoRA with the factors `P diag(E)` and Q.

    Args:
        model: a decoder with `LoRALinear`, `DoRALinear` or `AdaLoRALinear` adapters.
        scaling: the convention in which the scale is written, see `from_modules`.
        base: name or folder of the base model.

    Returns:
        The adapter, for `write_peft`. Directions in which both factors are zero, which nothing can train, are left out.

    Raises:
        ValueError: the model has no adapters, or one that is no low-rank pair.
    """
    modules: dict[str, PeftModule] = {}
    dropout = 0.0
    for path, adapter in iter_adapters(model):
        if not isinstance(adapter, LoRALinear) or type(adapter) not in _LOW_RANK:
            raise ValueError(
                f"{path}: {type(adapter).__name__} has no form in PEFT; merge it into the base with "
                f"remove_adapters(model, merge=True) instead"
            )
        dropout = adapter.dropout.rate if adapter.dropout is not None else dropout
        names = _names(model, path)
        stacked = jax.device_get(_arrays(adapter))
        for index, name in enumerate(names):
            arrays = jax.tree.map(lambda x, i=index: x[i], stacked) if path.startswith("layers.") else stacked
            modules[name] = _low_rank(**arrays)
    if not modules:
        raise ValueError("model must have adapters, found none")
    return from_modules(modules, scaling=scaling, base=base, dropout=dropout)


def load_adapters(model: Decoder, adapter: PeftAdapter) -> tuple[str, ...]:
    """Puts the adapters of a PEFT folder on a decoder, in place.

    Args:
        model: a decoder without adapters.
        adapter: from `read_peft`.

    Returns:
        The dotted paths of the wrapped layers.

    Raises:
        ValueError: the adapter is more than LoRA (see `PeftAdapter.modules`), does not fit the model, or is not what
            its own config says; the message names the field or the tensor. The model is then as it was.

    Notes:
        Stacked layers share one rank: smaller ones are filled up with zeros, and a layer without an adapter is all
        zeros. Products are exact; such zeros have no gradient and stay, and a pair with them is not balanced in
        training. Dropout, a matter of training, is not put back.
    """
    if any(True for _ in iter_adapters(model)):
        raise ValueError("model must have no adapters; remove them first")
    places = _places_of(model)
    modules = adapter.modules()
    _check_fit(adapter, modules, places)
    _check_numbers(modules)
    _check_base(adapter, model)
    by_path: dict[str, dict[int | None, PeftModule]] = {}
    for name, low_rank in modules.items():
        by_path.setdefault(places[name].path, {})[places[name].layer] = low_rank
    layer = DoRALinear if adapter.config.get("use_dora") else LoRALinear
    add_adapters(model, targets=list(by_path), rank=1, layer=layer, rngs=nnx.Rngs(0))
    for path, wrapped in iter_adapters(model):
        assert isinstance(wrapped, LoRALinear)
        _fill(wrapped, by_path[path])
    return tuple(by_path)


class _Place(NamedTuple):
    path: str
    layer: int | None
    shape: tuple[int, int]


def _names(model: Decoder, path: str) -> list[str]:
    """Hugging Face's names of the modules at a path, one for each stacked layer."""
    if path.startswith("layers."):
        return [f"model.{path.replace('layers', f'layers.{n}', 1)}" for n in range(model.config.num_hidden_layers)]
    return [path]  # the head


def _places_of(model: Decoder) -> dict[str, _Place]:
    """Where each linear layer stands, by its name in PEFT."""
    places: dict[str, _Place] = {}
    for keys, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            path = ".".join(map(str, keys))
            names, (rows, columns) = _names(model, path), module.kernel.shape[-2:]
            stacked = path.startswith("layers.")
            places |= {name: _Place(path, n if stacked else None, (rows, columns)) for n, name in enumerate(names)}
    return places


def _arrays(adapter: LoRALinear) -> dict[str, jax.Array]:
    """What the export of an adapter needs, as arrays with the same leading axis."""
    lora_a, lora_b = adapter.update_factors()
    if adapter.offset_a is not None and adapter.offset_b is not None:
        lora_a = jnp.concatenate([lora_a, adapter.offset_a[...]], -1)
        lora_b = jnp.concatenate([lora_b, -adapter.offset_b[...]], -2)
    arrays = {"lora_a": lora_a, "lora_b": lora_b, "scale": adapter.scale[...]}
    return arrays | ({"magnitude": adapter.magnitude[...]} if isinstance(adapter, DoRALinear) else {})


def _low_rank(
    lora_a: np.ndarray, lora_b: np.ndarray, scale: np.ndarray, magnitude: np.ndarray | None = None
) -> PeftModule:
    alive = np.flatnonzero(lora_a.any(0) | lora_b.any(1))
    alive = alive if alive.size else np.zeros(1, int)  # a module has at least rank 1
    return PeftModule(lora_a[:, alive], lora_b[alive], float(scale), magnitude)


def _check_fit(adapter: PeftAdapter, modules: dict[str, PeftModule], places: dict[str, _Place]) -> None:
    """Raises if adapter and model differ in their modules or in the sides of a weight."""
    for name, low_rank in modules.items():
        if name not in places:
            near = difflib.get_close_matches(name, places, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            hint = "; its head is tied to the embedding" if name == "lm_head" else hint
            raise ValueError(
                f"the tensor {tensor_name(name, 'lora_A.weight')} matches no linear layer of the model{hint}"
            )
        (rows, columns), rank = places[name].shape, low_rank.lora_a.shape[1]
        sizes = {"lora_A.weight": (rank, rows), "lora_B.weight": (columns, rank), "lora_magnitude_vector": (columns,)}
        found = {"lora_A.weight": low_rank.lora_a.T, "lora_B.weight": low_rank.lora_b.T}
        if low_rank.magnitude is not None:
            found["lora_magnitude_vector"] = low_rank.magnitude
        for part, tensor in found.items():
            if tensor.shape != sizes[part]:
                raise ValueError(
                    f"the tensor {tensor_name(name, part)} must have shape {sizes[part]} for this model, "
                    f"got {tensor.shape}"
                )
    targets = adapter.targets(places)
    if missing := sorted(targets - modules.keys()):
        raise ValueError(
            f"{TENSOR_FILE} lacks the tensor {tensor_name(missing[0], 'lora_A.weight')}, which target_modules asks for"
        )
    if odd := sorted(modules.keys() - targets):
        raise ValueError(
            f"{TENSOR_FILE} holds the tensor {tensor_name(odd[0], 'lora_A.weight')}, but target_modules, "
            f"exclude_modules or layers_to_transform leave it out, and PEFT would drop it"
        )


def _check_numbers(modules: dict[str, PeftModule]) -> None:
    """Raises if float32, in which adapters are kept, cannot hold a number of them."""
    for name, low_rank in modules.items():
        if abs(low_rank.scale) > largest("float32"):
            raise ValueError(
                f"{CONFIG_FILE}: the scale of {name} {too_large(low_rank.scale, 'float32')}; look at lora_alpha and r"
            )
        found = zip(PARTS, (low_rank.lora_a, low_rank.lora_b, low_rank.magnitude), strict=True)
        for part, tensor in found:
            if tensor is not None:
                with np.errstate(over="ignore"):
                    check_cast(f"the tensor {tensor_name(name, part)}", tensor, tensor.astype(np.float32))


def _check_base(adapter: PeftAdapter, model: Decoder) -> None:
    """Raises if the adapter brings embeddings of its own."""
    for key, name in adapter.base_copies().items():
        if name == "lm_head.weight" and not model.config.tie_word_embeddings:
            own = model.lm_head.kernel[...].T
        else:
            own = model.embed_tokens.embedding[...]
        copy = adapter.tensors[key]
        # PEFT may have held the model in another dtype: equal are those that are so in the narrower of the two
        narrow = min(copy.dtype, own.dtype, key=lambda dtype: jnp.finfo(dtype).bits)
        if copy.shape != own.shape or not bool((jnp.asarray(copy).astype(narrow) == own.astype(narrow)).all()):
            raise ValueError(f"the tensor {key} must be the model's own {name}, but it differs: not implemented")


def _fill(wrapped: LoRALinear, low_ranks: dict[int | None, PeftModule]) -> None:
    """Sets the values of a fresh adapter of rank 1; layers that are not given stay without effect."""
    rank = max(low_rank.lora_a.shape[1] for low_rank in low_ranks.values())
    *leading, rows, _ = wrapped.lora_a.shape
    lora_a, lora_b = np.zeros((*leading, rows, rank), np.float32), np.zeros((*leading, rank, wrapped.lora_b.shape[-1]))
    scale = np.array(wrapped.scale[...])
    for layer, low_rank in low_ranks.items():
        at = () if layer is None else (layer,)
        own = low_rank.lora_a.shape[1]
        lora_a[(*at, ..., slice(own))] = low_rank.lora_a
        lora_b[(*at, slice(own))] = low_rank.lora_b
        scale[at] = low_rank.scale
        if low_rank.magnitude is not None and isinstance(wrapped, DoRALinear):
            wrapped.magnitude[at or ...] = jnp.asarray(low_rank.magnitude, jnp.float32)
    wrapped.rank = rank
    wrapped.lora_a = nnx.LoRAParam(jnp.asarray(lora_a, jnp.float32))
    wrapped.lora_b = nnx.LoRAParam(jnp.asarray(lora_b, jnp.float32))
    wrapped.scale[...] = jnp.asarray(scale)
