"""Run directories written by hand, in the format of `balora_jax.training.records`."""

import dataclasses
import json

from balora_jax.training import Config
from balora_jax.training.fields import with_fields

LOSSES = {  # method, learning rate: by seed
    ("lora", 0.1): (2.0, 2.2, 2.4),
    ("lora", 0.2): (1.0, 1.1, 1.2),
    ("lora", 0.4): (0.5, 0.6, "nan"),
    ("balora", 0.1): (0.9, 0.8, 1.0),
    ("balora", 0.2): (1.5, 1.5, 1.5),
    ("balora", 0.4): (1.6, 1.6, 1.6),
}


def write_run(folder, losses=LOSSES, *, unfinished=(), field="optimizer.learning_rate", changes=None):
    """Writes a run whose members have a method, a value of a field and a seed; `changes` are of all members."""
    folder.mkdir()
    configs, records = {}, []
    for (method, value), by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            name = f"{method}-{value}-{seed}"
            own = {"method": method, field: value, "seed": seed} | (changes or {})
            configs[name] = dataclasses.asdict(with_fields(Config(name="x"), own))
            shared = {"population": method, "member": name}
            records.append({"kind": "evaluation", "step": 0, "evaluation_loss": 3.0, **shared})
            for step in range(1, 6):
                gaps = {"gap_mean": 0.1 * step, "gap_worst": 0.2 * step} if method == "lora" else {"gap_mean": 1e-7}
                records.append({"kind": "train", "step": step, "loss": 3.0 - 0.1 * step, **gaps, **shared})
            records.append({"kind": "evaluation", "step": 5, "evaluation_loss": loss, **shared})
            if name not in unfinished:
                diverged = 4 if loss == "nan" else -1
                records.append(
                    {"kind": "result", "step": 5, "evaluation_loss": loss, "diverged_at": diverged, **shared}
                )
    (folder / "config.json").write_text(json.dumps(configs))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "environment.json").write_text(json.dumps([{"commit": folder.name}]))
    return folder
