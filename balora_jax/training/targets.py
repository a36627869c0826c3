"""Accelerators that programs are compiled for without having them, and what their vendors say of them.

XLA's compilers for TPUs and NVIDIA GPUs need a description of the devices, not the devices.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.experimental import topologies

from balora_jax.errors import ConfigError


@dataclass(frozen=True)
class Chip:
    """One accelerator as its vendor describes it.

    Attributes:
        platform: `"cuda"` or `"tpu"`.
        memory: bytes that programs can have.
        peak: operations per second of dense products: of `"bfloat16"`, of `"float32"` at JAX's default precision (TF32
            on GPUs, bfloat16 on TPUs), of `"highest"`, which is float32 in full, and of `"float64"` where there is any.
        bandwidth: bytes per second between a device and its memory.
        link: bytes per second that a device sends, while it receives as many, along one axis of a mesh.
        network: the same between nodes; the same as `link` where all devices are linked.
        launch: seconds between the starts of two small operations; a rule of thumb, which no vendor states.
        source: where the vendor says so.
        compiler: the fields of XLA's description of a GPU that differ between kinds.
    """

    platform: str
    memory: float
    peak: Mapping[str, float]
    bandwidth: float
    link: float
    network: float
    launch: float
    source: str
    compiler: str = ""


def _gpu(name, memory, bandwidth, peaks, link, network, source, compiler) -> Chip:
    peak = dict(zip(("bfloat16", "float32", "highest", "float64"), peaks, strict=True))
    compiler = (
        f"gpu_device_info {{ {compiler} memory_bandwidth: {bandwidth} device_memory_size: {memory} "
        "threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 "
        "shared_memory_per_block: 49152 registers_per_core_limit: 65536 registers_per_block_limit: 65536 "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 } "
        f'platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }} device_description_str: "{name}"'
    )
    return Chip("cuda", memory, peak, bandwidth, link, network, 2e-6, source, compiler)


def _tpu(memory, peak, bandwidth, link, source) -> Chip:
    # float32 in full takes six products of bfloat16 parts
    peaks = {"bfloat16": peak, "float32": peak, "highest": peak / 6}
    return Chip("tpu", memory, peaks, bandwidth, link, link, 0.5e-6, source)


_HOPPER = (
    "core_count: 132 fpus_per_core: 128 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448 "
    "l2_cache_size: 52428800 clock_rate_ghz: 1.98 "
    "cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }"
)
_AMPERE = (
    "core_count: 108 fpus_per_core: 64 shared_memory_per_core: 167936 shared_memory_per_block_optin: 166912 "
    "l2_cache_size: 41943040 clock_rate_ghz: 1.41 cuda_compute_capability { major: 8 }"
)
_HOPPER_PEAKS, _AMPERE_PEAKS = (989.5e12, 494.7e12, 67e12, 67e12), (312e12, 156e12, 19.5e12, 19.5e12)
# of NVLink the half that one direction has; between nodes an adapter of InfiniBand a GPU, as in NVIDIA's DGX
_HOPPER_LINKS, _AMPERE_LINKS = (450e9, 50e9), (300e9, 25e9)
_NVIDIA, _GOOGLE = "https://www.nvidia.com/en-us/data-center", "https://docs.cloud.google.com/tpu/docs"

CHIPS: Mapping[str, Chip] = {
    "a100-40gb": _gpu(
        *("NVIDIA A100-SXM4-40GB", 42_331_013_120, 1_555_200_000_000, _AMPERE_PEAKS, *_AMPERE_LINKS),
        *(f"{_NVIDIA}/a100", _AMPERE),
    ),
    "a100-80gb": _gpu(
        *("NVIDIA A100-SXM4-80GB", 85_100_068_864, 2_039_040_000_000, _AMPERE_PEAKS, *_AMPERE_LINKS),
        *(f"{_NVIDIA}/a100", _AMPERE),
    ),
    "h100": _gpu(
        *("NVIDIA H100 80GB HBM3", 84_942_979_072, 3_352_320_000_000, _HOPPER_PEAKS, *_HOPPER_LINKS),
        *(f"{_NVIDIA}/h100", _HOPPER),
    ),
    "h200": _gpu(
        *("NVIDIA H200", 151_397_597_184, 4_800_000_000_000, _HOPPER_PEAKS, *_HOPPER_LINKS),
        *(f"{_NVIDIA}/h200", _HOPPER),
    ),
    # of a chip's links the two along one axis of the torus, and of these the half that one direction has
    "v5e": _tpu(15.75 * 2**30, 197e12, 819e9, 400e9 / 2 / 2, f"{_GOOGLE}/v5e"),
    "v5p": _tpu(95.74 * 2**30, 459e12, 2765e9, 1200e9 / 3 / 2, f"{_GOOGLE}/v5p"),
    "v6e": _tpu(31.25 * 2**30, 918e12, 1638e9, 800e9 / 2 / 2, f"{_GOOGLE}/v6e"),
}
"""The accelerators by the names that `balora-jax estimate --target` knows. GPUs are those with NVLink (SXM)."""

NODE = 8
"""GPUs that NVLink connects."""

_AXES = {"v5e": 2, "v5p": 3, "v6e": 2}
_WITHOUT_TPU = {  # what libtpu asks for on standard error otherwise, and a lock for one process at a time
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# Nothing can be measured, so the compiler must not choose by measuring; its own kernels for products would need that.
_WITHOUT_GPU: dict[str, str | bool | int] = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Target:
    """Some accelerators of one kind, connected.

    Attributes:
        name: of the kind, in `CHIPS`.
        shape: GPUs: their number; TPUs: the chips along each axis of their torus.
    """

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chip(self) -> Chip:
        """What one of them is."""
        return CHIPS[self.name]

    @property
    def size(self) -> int:
        """Number of devices."""
        return prod(self.shape)

    @property
    def node(self) -> int:
        """Number of devices that are linked without a network between."""
        return NODE if self.chip.platform == "cuda" else self.size

    @property
    def compiler_options(self) -> dict[str, str | bool | int]:
        """What XLA must be told."""
        return _WITHOUT_GPU if self.chip.platform == "cuda" else {}

    def devices(self) -> list[Any]:
        """Returns the devices as shardings take them, which can be compiled for, and hold nothing.

        Raises:
            ConfigError: the compiler is not installed, or knows no such devices.
        """
        on_gpus = self.chip.platform == "cuda"
        try:
            return list((self._gpus() if on_gpus else self._tpus()).devices)
        except (RuntimeError, NotImplementedError) as error:  # the latter: no plugin of this platform is known
            if not isinstance(error, jax.errors.JaxRuntimeError):
                extra = "estimate-gpu" if on_gpus else "estimate-tpu"
                raise ConfigError(
                    f"{self} needs XLA's compiler for it: pip install 'balora-jax[{extra}]'; no accelerator is needed"
                ) from error
            raise ConfigError(f"there are no {self}: {str(error).splitlines()[0]}") from error

    def _gpus(self):
        topology = f"{self.size // NODE}x1x{NODE}" if self.size > NODE else f"1x1x{self.size}"
        return topologies.get_topology_desc(
            platform="cuda", topology_name=self.name, target_config=self.chip.compiler, topology=topology
        )

    def _tpus(self):
        for name, value in _WITHOUT_TPU.items():
            os.environ.setdefault(name, value)
        padded = (*self.shape, 1, 1)[:3]
        bounds = {} if self.size >= 4 else {"chips_per_host_bounds": list(padded)}
        return topologies.get_topology_desc(platform="tpu", topology_name=str(self), **bounds)


def parse_target(text: str) -> Target:
    """Returns what a name as `h100:8` or `v5e:4x4` stands for.

    Raises:
        ConfigError: it stands for nothing.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise ConfigError(f"--target must be cpu or one of {', '.join(CHIPS)}, with how many, as h100:8; got {text}")
    axes = _AXES.get(name, 1)
    if not shape:
        return Target(name, (1,) * axes)
    if not re.fullmatch(r"[1-9]\d{0,4}" + r"x[1-9]\d{0,3}" * (axes - 1), shape):
        example = f"{name}:{'x'.join('4' * axes) if axes > 1 else 8}"
        what = f"the chips along {axes} axes" if axes > 1 else "their number"
        raise ConfigError(f"--target {name} takes {what}, as {example}; got {text}")
    target = Target(name, tuple(map(int, shape.split("x"))))
    if target.size > target.node and target.size % target.node:
        raise ConfigError(f"--target {name} comes in nodes of {target.node}; take fewer, or a multiple; got {text}")
    return target
