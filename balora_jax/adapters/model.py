"""Putting adapters on a whole model, merging them and taking them off."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from flax import nnx

from balora_jax.adapters.adapter import Adapter, MergeError
from balora_jax.adapters.initialisation import LORA, Initialisation
from balora_jax.adapters.lora import LoRALinear, Scaling
from balora_jax.limits import compiled, matching


def add_adapters(
    model: nnx.Module,
    *,
    targets: str | Sequence[str],
    rank: int,
    alpha: jax.typing.ArrayLike | None = None,
    scaling: Scaling = "lora",
    dropout: float = 0.0,
    layer: Callable[..., nnx.Module] = LoRALinear,
    initialisation: Initialisation = LORA,
    rngs: nnx.Rngs,
) -> tuple[str, ...]:
    """Wraps the chosen linear layers of a model, in place.

    Args:
        model: any NNX module.
        targets: a regular expression that must match the whole dotted path of a layer, or a sequence of names, each
            the path or the end of it (`"mlp.gate_proj"`, `"gate_proj"`).
        rank: rank of the adapters.
        alpha: numerator of the scale; default the rank.
        scaling: `"lora"` or `"rslora"`, see `LoRALinear`.
        dropout: see `LoRALinear`.
        layer: the adapter, called as `LoRALinear` is.
        initialisation: where the factors start, see `LoRALinear`.
        rngs: source of the random numbers.

    Returns:
        The dotted paths of the wrapped layers.

    Raises:
        ValueError: nothing matches, a name matches nothing, a layer has an adapter already, or the rank does not fit
            a weight; the message names the path.
        TypeError: a matched layer is not one that adapters go on.
    """
    modules = {".".join(map(str, path)): module for path, module in _outside_adapters(model)}
    matched = _matches(targets, modules)
    adapters = {}
    for path in matched:
        module = modules[path]
        if isinstance(module, Adapter):
            raise ValueError(f"{path} has an adapter already")
        if module is model:
            raise ValueError("model must hold the layers that get adapters, got a layer; wrap it in LoRALinear instead")
        try:
            adapters[id(module)] = layer(
                module,
                rank=rank,
                alpha=alpha,
                scaling=scaling,
                dropout=dropout,
                initialisation=initialisation,
                rngs=rngs,
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"{path}: {error}") from error
    _swap(model, adapters)  # only now, so that an error leaves the model as it was
    return matched


def iter_adapters(model: nnx.Module) -> Iterator[tuple[str, Adapter]]:
    """Yields the dotted path and the layer of every adapter of a model."""
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Adapter):
            yield ".".join(map(str, path)), module


def merge_adapters(model: nnx.Module) -> None:
    """Adds every adapter's update to its base weight, in place; `unmerge_adapters` undoes it exactly.

    Raises:
        ValueError: a weight would not be finite, as where its dtype cannot hold the sum. The model is then as it was.
    """
    done: list[Adapter] = []
    for path, adapter in _all_adapters(model):
        try:
            if not adapter.merged:
                adapter.merge()
                done.append(adapter)
        except MergeError as error:
            for other in done:
                other.unmerge()
            raise ValueError(f"{path}: {error}") from error


def unmerge_adapters(model: nnx.Module) -> None:
    """Puts the base weights back as they were before `merge_adapters`, bit for bit."""
    for _, adapter in _all_adapters(model):
        adapter.unmerge()


def remove_adapters(model: nnx.Module, *, merge: bool) -> None:
    """Puts the base layers back in the place of their adapters, in place.

    Args:
        model: a model with adapters.
        merge: whether the base layers keep the update (merge and unload) or lose it.

    Raises:
        ValueError: as for `merge_adapters`.
    """
    if merge:
        merge_adapters(model)
    else:
        unmerge_adapters(model)
    adapters = [adapter for _, adapter in _all_adapters(model)]
    _swap(model, {id(adapter): adapter.base for adapter in adapters})


def _all_adapters(model: nnx.Module) -> list[tuple[str, Adapter]]:
    found = list(iter_adapters(model))
    if not found:
        raise ValueError("model must have adapters, found none")
    return found


def _outside_adapters(model: nnx.Module) -> Iterator[tuple[tuple, nnx.Module]]:
    """The modules of a model, without those inside an adapter."""
    inside: list[tuple] = []
    modules = sorted(nnx.iter_modules(model), key=lambda item: len(item[0]))
    for path, module in modules:
        if any(path[: len(prefix)] == prefix for prefix in inside):
            continue
        if isinstance(module, Adapter):
            inside.append(path)
        yield path, module


def _matches(targets: str | Sequence[str], modules: dict[str, nnx.Module]) -> tuple[str, ...]:
    """The paths of the layers that the targets name; containers of layers are passed over."""
    layers = [path for path, module in modules.items() if _holds_weights(module)]
    if isinstance(targets, str):
        try:
            pattern = compiled(targets)
            with matching():
                matched = [path for path in layers if pattern.fullmatch(path)]
        except (TimeoutError, ValueError) as error:
            raise ValueError(f"targets must be a regular expression or names, got {targets!r}: {error}") from error
        if not matched:
            raise ValueError(f"targets {targets!r} matches no layer; there are {', '.join(layers) or 'none'}")
        return tuple(matched)
    matched = []
    for name in targets:
        found = [path for path in layers if path == name or path.endswith(f".{name}")]
        if not found:
            names = {path.rsplit(".", 1)[-1] for path in layers}
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(layers) or 'none'}"
            raise ValueError(f"targets: {name!r} matches no layer; {hint}")
        matched += [path for path in found if path not in matched]
    if not matched:
        raise ValueError("targets must name at least one layer, got none")
    return tuple(matched)


def _holds_weights(module: nnx.Module) -> bool:
    return isinstance(module, Adapter) or any(isinstance(value, nnx.Param) for value in vars(module).values())


def _swap(model: nnx.Module, new: dict[int, nnx.Module]) -> None:
    """Puts modules in the place of others, given by their ids, wherever the model refers to them."""
    for _, module in list(nnx.iter_modules(model)):
        for name, value in list(vars(module).items()):
            swapped = _swapped(value, new)
            if swapped is not value:
                setattr(module, name, nnx.data(swapped))


def _swapped(value: Any, new: dict[int, nnx.Module]) -> Any:
    """An attribute's value after the swap; itself if nothing in it was swapped."""
    if id(value) in new:
        return new[id(value)]
    if not isinstance(value, list | tuple | dict):
        return value
    before = dict(value) if isinstance(value, dict) else dict(enumerate(value))
    after = {key: _swapped(part, new) for key, part in before.items()}
    if all(after[key] is part for key, part in before.items()):
        return value
    return after if isinstance(value, dict) else type(value)(after.values())
