"""Where a model's files are: a folder, a model that ships with the package, or the Hugging Face hub."""

import re
import sys
from pathlib import Path

from balora_jax.errors import printable

PRETRAINED = Path(__file__).parent / "pretrained"


def model_folder(name: str | Path, *, weights: bool = True) -> Path:
    """Returns the folder of a model; one from the hub is fetched, or found where an earlier call left it.

    Before the hub is asked a line on the standard error says so, lest a folder's name was mistyped. With the
    environment variable `HF_HUB_OFFLINE=1` it is not asked.

    Args:
        name: a folder, the name of a model that ships with this package, or a name `owner/model` on the hub. The first
            that there is.
        weights: whether the weights are needed; without, the hub is asked for the small files alone.

    Raises:
        FileNotFoundError: there is no such model, or the hub cannot be reached.
    """
    if Path(name).is_dir():
        return Path(name)
    shipped = PRETRAINED / str(name)
    if shipped.is_dir():
        return shipped
    if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists():
        return _from_hub(name, weights)
    names = ", ".join(sorted(p.name for p in PRETRAINED.glob("*") if p.is_dir()))
    raise FileNotFoundError(
        f"{name} must be a model folder, the name of a shipped model ({names}) or a name owner/model on the hub"
    )


def _from_hub(name: str, weights: bool) -> Path:
    import huggingface_hub  # only here: it takes a while
    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError

    if not constants.HF_HUB_OFFLINE:
        print(f"there is no folder {printable(name)}; asking the Hugging Face hub for it", file=sys.stderr)
    patterns = ["*.json", "*.jinja", *(["model*.safetensors"] if weights else [])]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # what it raises without network, model or permission
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FileNotFoundError(
            f"{name} is no folder, and the Hugging Face hub does not give a model of this name: {reason}"
        ) from error
