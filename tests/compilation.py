"""How XLA compiles in tests. Most of the time of a test goes into compilation, for programs that run once."""

QUICK = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
    "xla_cpu_parallel_codegen_split_count": 1,
}
"""The options of all tests: they compile four times as fast."""

OPTIMIZED = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
    "xla_cpu_use_fusion_emitters": True,
    "xla_cpu_parallel_codegen_split_count": 32,
}
"""XLA's own options, as `compiler_options` for tests of what users get: memory, say."""

FLAGS = " ".join(f"--{name}={str(value).lower()}" for name, value in QUICK.items())
