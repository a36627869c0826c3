"""Reading and writing a decoder as a folder in Hugging Face's format: `config.json` and safetensors files."""

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from balora_jax.casting import check_cast
from balora_jax.files import read_object
from balora_jax.models.config_json import read_config, write_config
from balora_jax.models.decoder import SIZES, Decoder
from balora_jax.models.folders import model_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MOST_PARAMETERS = 2**46
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def abstract_decoder(
    name: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: bool = False,
    attention: str = "auto",
) -> Decoder:
    """Reads a decoder's `config.json` alone: shapes stand in the place of the weights, which need not be there.

    Args:
        name: as for `load_decoder`.
        dtype: as for `load_decoder`.
        param_dtype: as for `load_decoder`.
        remat: as for `load_decoder`.
        attention: as for `load_decoder`.

    Returns:
        A model whose parameters are `jax.ShapeDtypeStruct`s.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: the config is not supported.
    """
    config = read_config(model_folder(name, weights=False))
    for argument, wanted in (("dtype", dtype), ("param_dtype", param_dtype)):
        if wanted == "float64" and not jax.config.read("jax_enable_x64"):
            raise ValueError(f"{argument} float64 needs JAX's option jax_enable_x64; choose float32 without it")
    config = dataclasses.replace(config, dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention)
    width = 3 * config.intermediate_size + 2 * config.num_attention_heads * config.head_dim
    count = config.hidden_size * (config.vocab_size + config.num_hidden_layers * width)
    if count > _MOST_PARAMETERS:
        sizes = ", ".join(f"{size} {getattr(config, size)}" for size in SIZES)
        raise ValueError(f"{name}: config.json must be of a model that a machine can hold, got {sizes}")
    return nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))


def stored_dtypes(folder: Path) -> set[str]:
    """Returns the dtypes of a folder's weights.

    Raises:
        FileNotFoundError: the folder holds no weights.
        ValueError: a file is broken, or no weight is in float64, float32, float16 or bfloat16.
    """
    dtypes = _Tensors(folder).dtypes()
    if not dtypes:
        raise ValueError(f"{folder} must hold weights in {', '.join(_DTYPES.values())}, got none")
    return dtypes


def load_decoder(
    name: str | Path,
    *,
    dtype: str = "float32",
    param_dtype: str = "float32",
    remat: bool = False,
    attention: str = "auto",
    sharding: Sharding | Callable[[str, jax.ShapeDtypeStruct], Sharding] | None = None,
) -> Decoder:
    """Reads a decoder with its weights.

    Args:
        name: a folder with `config.json` and the weights, in `model.safetensors` or in the files that
            `model.safetensors.index.json` lists; the name of a model that ships with this package; or `owner/model` on
            the Hugging Face hub.
        dtype: dtype of activations and products.
        param_dtype: dtype to which the weights are converted.
        remat: whether activations are recomputed in the backward pass.
        attention: which program attends, see `balora_jax.models.kernels.attend`.
        sharding: where the parameters go: one sharding for all, or a function of a parameter's dotted path
            (`"layers.mlp.gate_proj.kernel"`) and shape `(layers, in, out)`. Default: the default device.

    Returns:
        The model.

    Raises:
        FileNotFoundError: there is no such model, or a file is missing.
        ValueError: the config is not supported, a file is broken, or a tensor is missing, of the wrong shape or dtype,
            one that the model does not have, or beyond the largest number of `param_dtype`.

    Notes:
        Parameters are read one after the other, tensor by tensor, and of a sharded one each process reads its own parts
        alone. Beside the model the host holds one tensor, and, for other devices than CPUs, the parts of one parameter
        (all layers) on their way; the largest parameters are first.
    """
    folder = model_folder(name)
    model = abstract_decoder(folder, dtype=dtype, param_dtype=param_dtype, remat=remat, attention=attention)
    state = nnx.state(model, nnx.Param)
    flat = dict(nnx.to_flat_state(state))
    tensors = _Tensors(folder)
    tensors.check((place.name, place.shape) for key in flat for place in _places(key, flat[key].shape))
    if model.config.tie_word_embeddings:
        tensors.check_tied("lm_head.weight", "model.embed_tokens.weight")
    for key in sorted(flat, key=lambda key: -math.prod(flat[key].shape)):
        expected = flat[key].get_value()
        read = _reader(tensors, key, expected)
        if sharding is None:
            array = jax.device_put(read((slice(None),) * len(expected.shape)), may_alias=True)
        else:
            of_this = sharding if isinstance(sharding, Sharding) else sharding(".".join(map(str, key)), expected)
            array = jax.make_array_from_callback(expected.shape, of_this, read)
        flat[key].set_value(jax.block_until_ready(array))  # lest what was read for several waits to be copied
    nnx.update(model, state)
    return model


def save_decoder(
    model: Decoder, folder: str | Path, *, base: str | Path | None = None, dtype: str | None = None
) -> None:
    """Writes a decoder in Hugging Face's format; `load_decoder` and `transformers` read it.

    Args:
        model: a decoder without adapters.
        folder: is made if it does not exist.
        base: the folder that the decoder was read from. What that holds beside the parameters (the head where it is
            tied, the frequencies of the rotary embedding) is written too.
        dtype: of all parameters; default those that the tensors have in the base, without a base the decoder's own.

    Raises:
        ValueError: the model has adapters, or a parameter that is not finite or that its dtype cannot hold.
    """
    config = model.config
    if jax.tree.leaves(nnx.state(model, nnx.LoRAParam)):
        raise ValueError("model must have no adapters; merge them with remove_adapters(model, merge=True) first")
    stored = None if base is None else _Tensors(Path(base))
    tensors = {}
    for key, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = np.asarray(jax.device_get(variable[...]))
        for place in _places(key, array.shape):
            tensor = array if place.layer is None else array[place.layer]
            own = stored.dtype(place.name) if stored and dtype is None else dtype or array.dtype
            tensors[place.name] = _cast(place.name, tensor.T if place.transposed else tensor, own)
    if stored:
        for name in stored.names() - tensors.keys():
            tied = name == "lm_head.weight"
            tensors[name] = tensors["model.embed_tokens.weight"] if tied else stored.read(name, ...)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(config, folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


class _Place(NamedTuple):
    """A tensor in Hugging Face's files, and the part of one of our parameters that it is."""

    name: str
    shape: tuple[int, ...]  # in the file
    layer: int | None  # of a stack
    transposed: bool


def tensor_name(path: str, layer: int | None = None) -> str:
    """Returns the name in the files of one of a decoder's parameters.

    Args:
        path: its dotted path, `"layers.mlp.up_proj.kernel"` say.
        layer: which of the stacked layers, if it is of one.
    """
    *parents, leaf = path.split(".")
    if parents[0] == "layers":
        parents.insert(1, str(layer))
    prefix = "" if parents[0] == "lm_head" else "model."
    return f"{prefix}{'.'.join(parents)}.{'bias' if leaf == 'bias' else 'weight'}"


def _places(key: tuple, shape: tuple[int, ...]) -> Iterator[_Place]:
    """The tensors of a parameter of this shape, one for each layer if layers are stacked; as many as a config says."""
    stacked, transposed = key[0] == "layers", key[-1] == "kernel"
    own = shape[1:] if stacked else shape
    for layer in range(shape[0]) if stacked else (None,):
        yield _Place(
            name=tensor_name(".".join(map(str, key)), layer),
            shape=own[::-1] if transposed else own,
            layer=layer,
            transposed=transposed,
        )


def _cast(name: str, tensor: np.ndarray, dtype: Any) -> np.ndarray:
    """A tensor as it is written; raises if it is not finite."""
    if not np.isfinite(tensor).all():
        raise ValueError(f"the tensor {name} must be finite to be written, got a NaN or an infinity")
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor.astype(dtype))
    check_cast(f"the tensor {name}", tensor, cast)
    return cast


def _reader(tensors: "_Tensors", key: tuple, expected: jax.ShapeDtypeStruct) -> Callable[[Any], np.ndarray]:
    """A function from the slices of a part of a parameter to the part, read from the files."""
    places = list(_places(key, expected.shape))

    def read_into(out: np.ndarray, place: _Place, index: tuple) -> None:
        part = tensors.read(place.name, index[::-1]).T if place.transposed else tensors.read(place.name, index)
        with np.errstate(over="ignore"):
            out[...] = part
        check_cast(f"{tensors.file(place.name)}: the tensor {place.name}", part, out)

    def read(index) -> np.ndarray:
        sizes = [len(range(size)[part]) for size, part in zip(expected.shape, index, strict=True)]
        out = _aligned(sizes, expected.dtype)
        if places[0].layer is None:
            read_into(out, places[0], index)
        else:
            for row, place in zip(out, places[index[0]], strict=True):
                read_into(row, place, index[1:])
        return out

    return read


def _aligned(shape: list[int], dtype: jnp.dtype) -> np.ndarray:
    """An empty array at a multiple of 64 bytes, which a CPU device takes over where it would copy another."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class _Tensors:
    """The tensors of a folder, in one file or in several, none of them held in memory."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        listed = {} if (folder / WEIGHTS).is_file() else _read_index(folder)
        for path in sorted({folder / file for file in listed.values()} or {folder / WEIGHTS}):
            if not path.is_file() and listed:
                first = next(name for name, file in listed.items() if folder / file == path)
                raise FileNotFoundError(f"{path} does not exist, in which {INDEX} has the tensor {first} and others")
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    if listed and listed.get(name) != path.name:
                        raise ValueError(f"{path} holds the tensor {name}, which {INDEX} does not have there")
                    part = file.get_slice(name)
                    self._files[name], self._headers[name] = path, (tuple(part.get_shape()), part.get_dtype())
        absent = [name for name in listed if name not in self._files]
        if absent:
            raise ValueError(f"{folder / listed[absent[0]]} lacks the tensor {absent[0]}, which {INDEX} has there")

    def names(self) -> set[str]:
        """All tensors."""
        return set(self._files)

    def file(self, name: str) -> Path:
        """The file of a tensor."""
        return self._files[name]

    def dtype(self, name: str) -> str:
        """The dtype of a weight."""
        return _DTYPES[self._headers[name][1]]

    def dtypes(self) -> set[str]:
        """The dtypes of the weights, of those that there may be."""
        found = {dtype for name, (_, dtype) in self._headers.items() if name.endswith(".weight")}
        return {_DTYPES[dtype] for dtype in found & _DTYPES.keys()}

    def read(self, name: str, index: Any) -> np.ndarray:
        """A part of a tensor, given by slices."""
        with _opened(self._files[name]) as file:  # anew for each, lest the pages of a mapped file add up
            return file.get_slice(name)[index]

    def check(self, expected: Iterable[tuple[str, tuple[int, ...]]]) -> None:
        """Raises if a tensor is missing, does not fit, or has no place in the model; takes names with their shapes."""
        known = {"lm_head.weight"}  # some files hold it though it is tied
        for name, shape in expected:
            known.add(name)
            if name not in self._headers:
                raise ValueError(f"{self._folder} lacks the tensor {name}")
            found, dtype = self._headers[name]
            if found != shape:
                raise ValueError(f"{self._files[name]}: the tensor {name} must have shape {shape}, got {found}")
            if dtype not in _DTYPES:
                raise ValueError(
                    f"{self._files[name]}: the tensor {name} must be of dtype {' or '.join(_DTYPES)}, got {dtype}"
                )
        for name, path in self._files.items():
            if name not in known and not name.endswith("rotary_emb.inv_freq"):  # which old files hold
                raise ValueError(f"{path} holds the tensor {name}, which a model of this config does not have")

    def check_tied(self, name: str, other: str) -> None:
        """Raises if the first tensor is there and is not the second."""
        if name not in self._files:
            return
        shape = self._headers[other][0]
        same = self._headers[name] == self._headers[other]
        rows = 1 + 2**24 // shape[1]  # a part at a time
        for start in range(0, shape[0] if same else 0, rows):
            index = slice(start, min(start + rows, shape[0])), slice(None)
            same = same and np.array_equal(self.read(name, index), self.read(other, index))
        if not same:
            raise ValueError(
                f"{self._files[name]}: the tensor {name} must be {other}, because config.json has "
                f"tie_word_embeddings, but it differs"
            )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except SafetensorError as error:
        cut = _first_tensor_cut_off(path)
        what = f": it ends before the end of the tensor {cut}" if cut else f" or not a safetensors file: {error}"
        raise ValueError(f"{path} is broken{what}") from error


def _first_tensor_cut_off(path: Path) -> str | None:
    """The first tensor of a file's header that reaches beyond the file's end; None if there is none, or no header."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        try:
            header = json.loads(file.read(start - 8)) if start <= size else {}
            ends = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
            return next((name for name in sorted(ends, key=ends.__getitem__) if start + ends[name] > size), None)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return None


def _read_index(folder: Path) -> dict[str, str]:
    """The file of each tensor."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{folder} must hold {WEIGHTS} or {INDEX}, found neither")
    files = read_object(path).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{path}: weight_map must give the file of each tensor, got {files!r:.80}")
    return files
