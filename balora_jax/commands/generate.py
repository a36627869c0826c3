"""`balora-jax generate`: a model, perhaps with an adapter, continues texts."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from balora_jax.commands.arguments import parse
from balora_jax.commands.folders import check_peft, explained
from balora_jax.console import PlainConsole
from balora_jax.errors import ConfigError
from balora_jax.models.folders import model_folder


@dataclass(frozen=True)
class Options:
    """Continues texts token by token, all texts at once.

    Attributes:
        model: a folder, or the name of a model that ships with the package.
        adapter: a PEFT folder.
        tokenizer: another model's folder or name, whose tokenizer is taken; default the adapter's, if its folder holds
            one, otherwise the model's.
        prompt: the texts; default the lines of the standard input.
        chat: puts each text to the assistant, as a user's turn in the tokenizer's chat template.
        system: the system prompt that goes before, with `--chat`; default that of the template, if it has one.
        max_new_tokens: the longest continuation.
        temperature: 0 takes the most likely token at each step; otherwise tokens are drawn, at 1 as the model has them.
        seed: of the draws.
        dtype: of the weights and the arithmetic.
        tensor: devices that share the weights.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    adapter: Path | None = None
    tokenizer: str | None = None
    prompt: tuple[str, ...] = ()
    chat: bool = False
    system: str | None = None
    max_new_tokens: int = 64
    temperature: float = 0.0
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    tensor: int = 1


def main(arguments: list[str]) -> int:
    """Runs the command."""
    options = parse(Options, arguments, prog="balora-jax generate")
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, got {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature}")
    if options.system is not None and not options.chat:
        raise ConfigError("--system needs --chat, as only a conversation has a system prompt")
    if not -(2**63) <= options.seed < 2**63:
        raise ConfigError(f"--seed must be an integer of 64 bits, got {options.seed}")
    if not options.prompt and (sys.stdin is None or sys.stdin.isatty()):
        raise ConfigError("give --prompt TEXT ..., or texts on the standard input, one in a line")
    try:
        prompts = options.prompt or tuple(line for line in sys.stdin.read().splitlines() if line)
    except UnicodeDecodeError as error:
        raise ConfigError(f"the standard input must be text in UTF-8: {error}") from error
    if not prompts:
        raise ConfigError("the standard input holds no texts")
    if options.adapter is not None:
        check_peft("--adapter", options.adapter)
    with explained("MODEL"):
        folder = model_folder(options.model)
    from balora_jax.commands.generated import continued  # heavy: after the cheap mistakes

    pairs = continued(options, folder, prompts)
    console = PlainConsole(soft_wrap=True)
    for prompt, text in pairs:
        console.print(prompt, end="\n" if options.chat else "", style="dim")
        console.print(text)
    return 0
