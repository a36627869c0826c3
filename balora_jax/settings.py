"""The settings of a run, part by part, and the names of choices: no more than the standard library is imported.

So the command line tells of a wrong flag before JAX is there. What a setting does is decided where it is used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

Gauge = Literal["svd", "raw_svd", "nearest", "symmetric"]
METHOD_NAMES = (
    *("full", "galore", "lora", "rslora", "lora_plus", "dora", "olora", "pissa", "lora_ga", "lora_rite"),
    *(
        "reflora",
        "reflora_drawn",
        "reflora_s",
        "loro",
        "scaled_gd",
        "scaled_adamw",
        "lora_pro",
        "adalora",
        "balora",
        "balora_ga",
        "balora_gd",
    ),
    *("balora_plus", "balora_rslora", "balora_dora", "balora_olora", "balora_pissa"),
)
"""The names in `balora_jax.methods.METHODS`, in its order."""


class Option(NamedTuple):
    """A number of a method's own.

    Attributes:
        default: an integer where the number must be one.
        meaning: what it does, in a line.
    """

    default: float
    meaning: str


Schedule = Literal["constant", "linear", "cosine"]
Attention = Literal["auto", "blocks", "cudnn", "splash"]
ATTENTIONS: tuple[str, ...] = get_args(Attention)


@dataclass(frozen=True)
class ModelSettings:
    """The frozen base.

    Attributes:
        path: folder in Hugging Face's format, the name of a model that ships with the package, or `owner/model` on the
            Hugging Face hub.
        dtype: dtype of activations and products.
        param_dtype: dtype of the base weights.
        remat: whether activations are recomputed in the backward pass.
        attention: `"blocks"` everywhere; `"cudnn"` on GPUs, `"splash"` on TPUs, kernels for half precision, with blocks
            elsewhere; `"auto"` for both where they fit.
    """

    path: str = "school-math"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    attention: Attention = "auto"


@dataclass(frozen=True)
class AdapterSettings:
    """The adapters.

    Attributes:
        rank: their rank.
        alpha: numerator of the scale.
        targets: names of the layers that get one; a single entry with other than letters, digits, `_` and `.` is a
            regular expression over dotted paths.
        dropout: probability of dropping an entry of an adapter's input.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    dropout: float = 0.0


@dataclass(frozen=True)
class OptimizerSettings:
    """Settings of AdamW; the defaults are those of the BaLoRA paper's runs (arXiv 2605.31484).

    Attributes:
        learning_rate: peak of the schedule.
        schedule: `"constant"`, or a decay to zero at the last step.
        warmup_steps: the rate rises linearly from 0 over so many steps.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled weight decay.
        clip_norm: the gradient's global norm is clipped to this; None for no clipping.
    """

    learning_rate: float = 1e-3
    schedule: Schedule = "constant"
    warmup_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float | None = 1.0


@dataclass(frozen=True)
class BalanceSettings:
    """How the methods that balance their adapters do it; see `balora_jax.balora`.

    Attributes:
        gauge: which balanced pair.
        transport: whether the optimizer's moments are carried along; the paper leaves them as they are, but on language
            models it pays (experiments/gauges).
        every: steps between projections.
        start_step: number of first steps without.
        least_ratio: share of the larger factor's norm that the smaller one must have; the paper waits for nothing.
    """

    gauge: Gauge = "svd"
    transport: bool = True
    every: int = 1
    start_step: int = 0
    least_ratio: float = 0.03


@dataclass(frozen=True)
class DataSettings:
    """What is learned and how it is laid out.

    Attributes:
        recipe: name of the data set, see `RECIPES`.
        path: where the published data lie, see `read_source`; None for the Hub, or to generate.
        tokenizer: another model's folder or name on the Hub whose tokenizer and chat template are taken, as an instruct
            model's for its base; None for the model's own.
        modules: parts of the data set to use; empty for all. Of a split of harder questions (`extrapolate`), those of
            the same name, and with `_big`, `_longer`, `_more` or `_more_samples` behind it.
        difficulty: difficulties of generated questions, mixed evenly.
        train_examples: largest number of training examples; None for all of a published data set.
        eval_examples: largest number of evaluation examples; None for all of a published evaluation split. A data set
            without such a split holds this number out from training.
        eval_split: the published split to evaluate on; None for `validation` where there is one, otherwise `test`, and
            for `interpolate` of DeepMind Mathematics.
        length: most tokens of a row; longer examples are left out, and counted, but bare texts are cut into pieces.
        packing: whether several examples share a row of this length in training. Otherwise rows are as long as the
            longest example, rounded up to a multiple of 64.
        seed: of the draw of the examples; the same for all runs that are compared.
    """

    recipe: str = "mathematics"
    path: str | None = None
    tokenizer: str | None = None
    modules: tuple[str, ...] = ()
    difficulty: tuple[int, ...] = (1, 2)
    train_examples: int | None = 10_000
    eval_examples: int | None = 500
    eval_split: str | None = None
    length: int = 128
    packing: bool = True
    seed: int = 0


@dataclass(frozen=True)
class EvaluationSettings:
    """One more data set that runs are evaluated on, beside the evaluation part of their own.

    Attributes:
        name: what it is called in the results.
        recipe: name of the data set, see `RECIPES`.
        path: where the published data lie, see `read_source`; None for the Hub, or to generate.
        modules: parts of the data set to use; empty for all.
        difficulty: difficulties of generated questions, mixed evenly.
        examples: largest number of examples; None for all of a published split.
        split: the published split; None for `validation` where there is one, otherwise `test`, or all of data without
            splits.
        seed: of the draw of the examples.
    """

    name: str
    recipe: str
    path: str | None = None
    modules: tuple[str, ...] = ()
    difficulty: tuple[int, ...] = (1, 2)
    examples: int | None = 500
    split: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class TrainingSettings:
    """The loop.

    Attributes:
        steps: number of optimizer steps. A finished run goes on to more where its first steps do not depend on their
            number: with a constant learning rate, and by any method but AdaLoRA.
        batch_size: rows per micro-batch.
        accumulate: micro-batches per step.
        eval_every: steps between evaluations; there is one before the first and one after the last step too.
        eval_batch_size: examples per evaluation batch.
        checkpoint_every: steps between checkpoints.
        keep_checkpoints: number of checkpoints kept.
        log_every: steps between writes of the metrics of every step.
        members_at_once: runs of a population that are computed at the same time; None for all, but two on a CPU, which
            is fastest there. Fewer need less memory.
        max_new_tokens: tokens generated per answer in the evaluation; None for the length of the longest right answer.
        select: the adapters that a run ends with, and that its results are of: those of the `"last"` step, or the
            `"best"`, of the lowest evaluation loss.
        patience: evaluations in a row without a lower evaluation loss after which a run stops; None for no such stop.
    """

    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    eval_every: int = 100
    eval_batch_size: int = 64
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    log_every: int = 10
    members_at_once: int | None = None
    max_new_tokens: int | None = None
    select: Literal["last", "best"] = "last"
    patience: int | None = None


@dataclass(frozen=True)
class ParallelSettings:
    """How a run is spread over devices and processes; no part of what is computed, so that it may change on the way.

    Attributes:
        data: parts of the mesh that share the rows of a batch, or the members of a population where it divides their
            number; -1 for as many as the other two leave, and the rows or members can be divided by.
        fsdp: parts that the weights are cut into, along which the rows are shared too; each layer is put together when
            it is used.
        tensor: parts that share the products of each layer.
        coordinator: `host:port` of the first process, of a run of several; None where the cluster's own environment
            tells (Slurm, Open MPI, Cloud TPU), or there is one process.
        processes: their number.
        process: which of them this is, from 0.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


class Options(dict[str, float]):
    """Numbers by name that are not to be changed, so that a config has a hash."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


@dataclass(frozen=True)
class Config:
    """One run.

    Attributes:
        name: of the experiment, without `/`; the default output folder is `runs/<name>`.
        method: a name in `balora_jax.methods.METHODS`.
        options: the method's own numbers by name, where they differ from their defaults.
        seed: decides the adapters' start, the order of the data and the dropout.
        model: the frozen base.
        adapter: the adapters.
        optimizer: the optimizer.
        balance: how balanced methods balance.
        data: the data.
        training: the loop.
        parallel: the devices.
        evaluations: data sets that the run is evaluated on too, at every evaluation.
    """

    name: str
    method: str = "lora"
    options: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    balance: BalanceSettings = field(default_factory=BalanceSettings)
    data: DataSettings = field(default_factory=DataSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    evaluations: tuple[EvaluationSettings, ...] = ()

    def __post_init__(self):
        if isinstance(self.options, Mapping):
            object.__setattr__(self, "options", Options(self.options))
