"""Training against PEFT with torch's optimizers: the same model, adapters and batch give the same losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from balora_jax.adapters import export_adapters, write_peft
from balora_jax.methods import BalanceSettings, get_method
from balora_jax.models import Decoder, DecoderConfig
from balora_jax.models.weights import save_decoder
from balora_jax.optimizers import OptimizerSettings
from balora_jax.training import AdapterSettings, Config
from balora_jax.training.program import Program

REASON = "the comparison needs the original library, which is no dependency"
torch = pytest.importorskip("torch", reason=REASON)
peft = pytest.importorskip("peft", reason=REASON)
transformers = pytest.importorskip("transformers", reason=REASON)

STEPS = 12
QWEN2 = DecoderConfig(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    rope_theta=1e6,
    qkv_bias=True,
)
TARGETS = tuple(f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down"))
ADAMW = OptimizerSettings(learning_rate=1e-2, b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, clip_norm=0.5)
SGD = OptimizerSettings(learning_rate=0.2, clip_norm=None)


@pytest.fixture(scope="module")
def model():
    return Decoder(QWEN2, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def batch():
    """Texts of different lengths, padded, of whose tokens some are to be predicted."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, QWEN2.vocab_size, (4, 24))
    segment_ids = (np.arange(24) < np.array([[24], [20], [11], [5]])).astype(np.int32)
    return {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(24), tokens.shape),
        "segment_ids": segment_ids,
        "loss_mask": (rng.random(tokens.shape) < 0.6) & (segment_ids > 0),
    }


def peft_losses(model, batch, settings, optimizer):
    """The loss before each step of PEFT's training, with an optimizer of torch."""
    tokens, kept = torch.tensor(batch["tokens"]), torch.tensor(batch["segment_ids"])
    labels = torch.tensor(np.where(batch["loss_mask"], batch["tokens"], -100))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = optimizer(trained), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model.train()(input_ids=tokens, attention_mask=kept, labels=labels).loss
        loss.backward()
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        losses.append(loss.item())
    return losses


def torch_adamw(parameters):
    betas = ADAMW.b1, ADAMW.b2
    return torch.optim.AdamW(
        parameters, lr=ADAMW.learning_rate, betas=betas, eps=ADAMW.eps, weight_decay=ADAMW.weight_decay
    )


def torch_sgd(parameters):
    return torch.optim.SGD(parameters, lr=SGD.learning_rate)


@pytest.mark.parametrize(
    ("method", "settings", "optimizer"),
    [
        ("lora", ADAMW, torch_adamw),
        ("rslora", ADAMW, torch_adamw),
        ("dora", ADAMW, torch_adamw),
        ("balora_gd", SGD, torch_sgd),
    ],
)
def test_losses_are_those_of_peft(model, batch, method, settings, optimizer, tmp_path):
    config = Config(
        name="parity",
        method=method,
        adapter=AdapterSettings(rank=3, alpha=6.0, targets=TARGETS),
        optimizer=settings,
        balance=BalanceSettings(start_step=STEPS),  # gradient descent that is not yet balanced
    )
    program = Program(config, model)
    state = program.initial_state([config])
    save_decoder(model, tmp_path / "base")
    start = export_adapters(
        program.member_model(jax.tree.map(lambda x: x[0], state), program.base), scaling=get_method(method).scaling
    )
    write_peft(start, tmp_path / "adapter")
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    original = peft.PeftModel.from_pretrained(original, tmp_path / "adapter", is_trainable=True)
    expected = peft_losses(original, batch, settings, optimizer)
    losses = []
    for _ in range(STEPS):
        state, metrics = program.step(state, program.base, {k: jnp.asarray(v)[None, None] for k, v in batch.items()})
        losses.append(float(metrics["loss"][0]))
    assert losses[-1] < losses[0] - 0.1, "too little is learnt to tell"
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-5)
