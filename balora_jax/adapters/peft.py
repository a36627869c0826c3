"""Adapters as PEFT has them: the fields of `adapter_config.json` and the tensors of `adapter_model.safetensors`.

A module's factors are the tensors `base_model.model.<module>.lora_A.weight (r, in)` and `....lora_B.weight (out, r)`,
the transposes of `lora_a` and `lora_b`; DoRA adds `....lora_magnitude_vector (out,)`. Neither torch nor PEFT is needed.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from balora_jax.adapters.lora import Scaling, adapter_scale
from balora_jax.limits import compiled, matching
from balora_jax.pairs import Pair, find_pairs
from balora_jax.trees import path_text

CONFIG_FILE, TENSOR_FILE = "adapter_config.json", "adapter_model.safetensors"

_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)"
)
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>lm_head|model\.embed_tokens)(\.base_layer)?\.weight")
_MODULE = r"(.*\.)?({})$"  # what PEFT puts around the keys of patterns
PARTS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# What would change the meaning of the factors, with the values under which it does not.
_PLAIN: dict[str, tuple] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva", "mica"),  # others take something from the base
    **{
        name: (None, False, [], {})
        for name in (
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "layer_replication",
            "lora_bias",
            "modules_to_save",
            "monteclora_config",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        )
    },
}

_NO_PAIRS = {
    "target_parameters": "its tensors hold several pairs",
    "use_bdlora": "its tensors hold several pairs",
    "kasa_config": "between its factors stands a diagonal",
}
"""Fields under which the tensors are not pairs whose product is the update."""


class PeftModule(NamedTuple):
    """The adapter of one module: `W + scale lora_a lora_b`, and with a magnitude DoRA's.

    Attributes:
        lora_a: `(in, r)`.
        lora_b: `(r, out)`.
        scale: the factor s.
        magnitude: `(out,)`, or None.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None


@dataclass(frozen=True)
class PeftAdapter:
    """What a PEFT folder holds.

    Attributes:
        config: the fields of `adapter_config.json`.
        tensors: by name, in the layout of the file.
        metadata: of the file of tensors.

    Raises:
        ValueError: a field of the config that names modules or layers, or is true or false, has not the form that it
            must have.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = field(default_factory=lambda: {"format": "pt"})

    def __post_init__(self):
        for name in ("rank_pattern", "alpha_pattern"):
            pattern = _checked(self.config, name, "an object", lambda value: isinstance(value, Mapping))
            _check_expressions(name, [text for key in pattern or () for text in (key, _MODULE.format(key))])
        for name in ("target_modules", "exclude_modules"):
            names = _checked(self.config, name, "a regular expression or a list of names", _is_one_or_many(str))
            _check_expressions(name, [names] if isinstance(names, str) else ())
        for name in ("use_rslora", "use_dora"):
            _checked(self.config, name, "true or false", lambda value: isinstance(value, bool))
        _checked(self.config, "layers_to_transform", "a layer's number or a list of them", _is_one_or_many(int))
        stacks = _checked(self.config, "layers_pattern", "a name or a list of names", _is_one_or_many(str))
        _check_expressions("layers_pattern", () if stacks is None else _many(stacks))

    def modules(self) -> dict[str, PeftModule]:
        """Returns the adapter of each module, by its name in the base model.

        Raises:
            ValueError: a field of the config is missing or has a value that is more than a low-rank update; a tensor is
                missing, is none of LoRA's, or has a shape that does not fit the config. The message names it.
        """
        config = self.config
        for name, values in _PLAIN.items():
            if name in config and config[name] not in values:
                raise ValueError(
                    f"{CONFIG_FILE}: {name} must be {' or '.join(map(repr, values[:2]))}, got {config[name]!r}: not "
                    f"implemented{_advice(name)}"
                )
        parts: dict[str, dict[str, np.ndarray]] = {}
        for key in sorted(self.tensors.keys() - self.base_copies().keys()):
            match = _TENSOR.fullmatch(key)
            if not match:
                raise ValueError(f"{TENSOR_FILE} holds the tensor {key}, which is not a factor of a linear layer")
            parts.setdefault(match["module"], {})[match["part"]] = self.tensors[key]
        return {module: self._low_rank(module, parts[module]) for module in sorted(parts)}

    def pairs(self) -> dict[str, Pair]:
        """Finds the pairs of all kinds of layers, by the names of their modules in order; `read_pairs` reads them.

        Raises:
            ValueError: a tensor is no factor of a matrix, or not one of a plain pair.
        """
        for name, why in _NO_PAIRS.items():
            if self.config.get(name):
                raise ValueError(f"{CONFIG_FILE}: {name} must not be set, got {self.config[name]!r}: {why}")
        pairs = {
            path_text(pair.path_a).removeprefix("base_model.model.").rpartition(".lora_")[0]: pair
            for pair in find_pairs(self.tensors, transposed=True)
        }
        return {name: pairs[name] for name in sorted(pairs, key=_in_order)}

    @property
    def takes_from_base(self) -> bool:
        """Whether the product that the factors started with is taken from the base's weights, as in PiSSA."""
        name = "init_lora_weights"
        return self.config.get(name, True) not in _PLAIN[name]

    def base_copies(self) -> dict[str, str]:
        """Returns the tensors that are copies of base weights, with their names in the base model.

        PEFT adds the input and the output embedding to an adapter of one of them, for the case that they were resized.
        """
        found = {key: _BASE_COPY.fullmatch(key) for key in self.tensors}
        return {key: match["module"] + ".weight" for key, match in found.items() if match}

    def scale(self, module: str) -> float:
        """Returns the factor s of a module's update, from `lora_alpha`, the rank and their patterns.

        Raises:
            ValueError: a field that decides it is missing or not a number.
        """
        alpha, rank = self._number("lora_alpha", "alpha_pattern", module), self.rank(module)
        return np.asarray(adapter_scale(alpha, rank, "rslora" if self.config.get("use_rslora") else "lora")).item()

    def rank(self, module: str) -> int:
        """Returns the rank that the config gives a module, by `r` and its pattern.

        Raises:
            ValueError: a field that decides it is missing or no positive integer.
        """
        rank = self._number("r", "rank_pattern", module)
        if not isinstance(rank, int) or rank < 1:
            raise ValueError(f"{CONFIG_FILE}: the rank of {module} must be a positive integer, got {rank!r}")
        return rank

    def targets(self, modules: Iterable[str]) -> set[str]:
        """Returns those modules of a model that the config asks for.

        Raises:
            ValueError: it does not say.
        """
        names, excluded = self.config.get("target_modules"), self.config.get("exclude_modules")
        if names is None:
            raise ValueError(
                f"{CONFIG_FILE}: target_modules must name the modules, got None: PEFT would choose them by the "
                f"architecture"
            )
        if isinstance(names, str) and names.lower() == "all-linear":
            names = r"(?!(.*\.)?lm_head$).*"
        layers, pattern = self.config.get("layers_to_transform"), self.config.get("layers_pattern")
        stack = f"(?:{'|'.join(_many(pattern))})" if pattern else r"[^.]*"
        index = compiled(rf"(?:.*?\.)?{stack}\.(\d+)\.")
        asked = set()
        with _matching("target_modules, exclude_modules or layers_pattern"):
            for module in modules:
                if not _names(names, module) or (excluded and _names(excluded, module)):
                    continue
                if layers not in (None, []) and not isinstance(names, str):
                    match = index.match(module)
                    if match is None or int(match[index.groups]) not in _many(layers):
                        continue
                asked.add(module)
        return asked

    def _low_rank(self, module: str, parts: dict[str, np.ndarray]) -> PeftModule:
        magnitude = bool(self.config.get("use_dora"))
        for part in PARTS[: 3 if magnitude else 2]:
            if part not in parts:
                raise ValueError(f"{TENSOR_FILE} lacks the tensor {tensor_name(module, part)}")
        if not magnitude and PARTS[2] in parts:
            raise ValueError(
                f"{TENSOR_FILE} holds the tensor {tensor_name(module, PARTS[2])}, but {CONFIG_FILE} does not set "
                f"use_dora"
            )
        rank = self.rank(module)
        for part, axis in (("lora_A.weight", 0), ("lora_B.weight", 1)):
            shape = parts[part].shape
            if len(shape) != 2 or shape[axis] != rank:
                wanted = f"({rank}, in)" if axis == 0 else f"(out, {rank})"
                raise ValueError(
                    f"{TENSOR_FILE}: the tensor {tensor_name(module, part)} must have shape {wanted}, got {shape}"
                )
        for part, tensor in parts.items():
            if not np.isfinite(tensor).all():
                raise ValueError(
                    f"{TENSOR_FILE}: the tensor {tensor_name(module, part)} must be finite, got a NaN or an infinity"
                )
        return PeftModule(parts[PARTS[0]].T, parts[PARTS[1]].T, self.scale(module), parts.get(PARTS[2]))

    def _number(self, name: str, pattern: str, module: str) -> Any:
        """A field's value for a module: that of the first key of its pattern that matches the module's name."""
        value = self.config.get(name)
        if value is None:
            raise ValueError(f"{CONFIG_FILE} lacks the field {name}, which the adapter depends on")
        special = self.config.get(pattern) or {}
        with _matching(pattern):
            key = next((key for key in special if re.match(_MODULE.format(key), module)), None)
        if key is not None:
            name, value = f"{pattern}[{key!r}]", special[key]
        try:
            number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
        except OverflowError:  # an integer beyond all floats
            number = False
        if not number:
            raise ValueError(f"{CONFIG_FILE}: {name} must be a number, got {value!r:.80}")
        return value


def tensor_name(module: str, part: str) -> str:
    """Returns the name in the file of a part (`"lora_A.weight"`, say) of a module's adapter."""
    return f"base_model.model.{module}.{part}"


def from_modules(
    modules: Mapping[str, PeftModule], *, scaling: Scaling = "lora", base: str | None = None, dropout: float = 0.0
) -> PeftAdapter:
    """Returns adapters in PEFT's form; `PeftAdapter.modules` is the inverse.

    Args:
        modules: by their names in the base model.
        scaling: the convention in which the scale is written: `lora_alpha / r`, or `lora_alpha / sqrt(r)`.
        base: name or folder of the base model.
        dropout: that they were trained with.

    Raises:
        ValueError: there is none, or DoRA and LoRA are mixed.
    """
    if not modules:
        raise ValueError("modules must hold at least one adapter, got none")
    plain = [module for module, low_rank in modules.items() if low_rank.magnitude is None]
    if plain and len(plain) < len(modules):
        raise ValueError(f"PEFT's format has DoRA for all modules or for none, but {plain[0]} has no magnitude")
    ranks = {module: low_rank.lora_a.shape[1] for module, low_rank in modules.items()}
    alphas = {
        module: _short(low_rank.scale / np.asarray(adapter_scale(1, ranks[module], scaling)).item())
        for module, low_rank in modules.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": scaling == "rslora",
        "use_dora": not plain,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "alpha_pattern": {module: a for module, a in alphas.items() if a != alpha},
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    tensors: dict[str, np.ndarray] = {}
    for module, low_rank in modules.items():
        found = (low_rank.lora_a.T, low_rank.lora_b.T, low_rank.magnitude)
        tensors |= {
            tensor_name(module, part): tensor for part, tensor in zip(PARTS, found, strict=True) if tensor is not None
        }
    return PeftAdapter(config, tensors)


def _checked(config: Mapping[str, Any], name: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
    """A field's value, None if it is not set; raises if it does not fit."""
    value = config.get(name)
    if value is not None and not fits(value):
        raise ValueError(f"{CONFIG_FILE}: {name} must be {wanted}, got {value!r}")
    return value


def _check_expressions(name: str, expressions: Iterable[str]) -> None:
    """Raises if one of a field's regular expressions is none."""
    for expression in expressions:
        try:
            compiled(expression)
        except ValueError as error:
            raise ValueError(f"{CONFIG_FILE}: {name}: {error}") from error


@contextlib.contextmanager
def _matching(fields: str) -> Iterator[None]:
    """Lets a block that matches the regular expressions of fields raise where one of them backtracks without end."""
    try:
        with matching():
            yield
    except TimeoutError as error:
        raise ValueError(f"{CONFIG_FILE}: {fields}: {error}") from error


def _is_one_or_many(kind: type) -> Callable[[Any], bool]:
    return lambda value: all(isinstance(one, kind) and not isinstance(one, bool) for one in _many(value))


def _many(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple | set) else [value]


def _advice(name: str) -> str:
    if name == "init_lora_weights":
        return (
            "; save it with PEFT's path_initial_model_for_weight_conversion, which makes it LoRA of the original base"
        )
    return ""


def _names(names: str | list[str], module: str) -> bool:
    """Whether a module is among names (or ends of names), or matches a regular expression."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_order(module: str) -> list[tuple]:
    """A key that sorts layer 10 behind layer 9."""
    return [(0, int(part)) if part.isdecimal() and len(part) < 20 else (1, part) for part in module.split(".")]


def _short(number: float) -> int | float:
    """The number as it was before float32 rounded it, if that had few digits."""
    short = float(f"{number:.6g}")
    number = short if math.isclose(short, number, rel_tol=2e-7) else number
    return int(number) if number.is_integer() else number
