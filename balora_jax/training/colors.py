"""The color of every method, the same in all figures: warm ones for balanced methods, cool ones and grays otherwise."""

from collections import Counter
from collections.abc import Iterable

METHOD_COLORS = {
    "full": "#000000",
    "galore": "#7F7F7F",
    "lora": "#0072B2",
    "rslora": "#28C0E0",
    "lora_plus": "#005800",
    "dora": "#602868",
    "olora": "#00C800",
    "pissa": "#E870F8",
    "lora_ga": "#0000F8",
    "lora_rite": "#C800F8",
    "reflora": "#00C0A0",
    "reflora_s": "#004838",
    "reflora_drawn": "#98F8D0",
    "loro": "#7080F0",
    "scaled_gd": "#98B858",
    "scaled_adamw": "#C898D8",
    "lora_pro": "#0030B0",
    "adalora": "#5F7F8F",
    "balora": "#D55E00",
    "balora_ga": "#800008",
    "balora_gd": "#C0A880",
    "balora_plus": "#D8A820",
    "balora_rslora": "#F890B8",
    "balora_dora": "#603040",
    "balora_olora": "#584000",
    "balora_pissa": "#F80050",
}
"""By the names of `balora_jax.methods.METHODS`: far apart in the CIELAB space, lora and balora by Okabe and Ito."""

DASHES = "solid", "dashed", "dotted", "dashdot"
"""The styles of the lines of one method, where a figure holds several."""


def color_of(method: str) -> str:
    """Returns the color of a method; gray for a name that the table lacks."""
    return METHOD_COLORS.get(method, "#595959")


def looks(methods: Iterable[str]) -> list[tuple[str, str]]:
    """Returns a color and a style of line for each of some lines, given by the names of their methods."""
    found = []
    seen: Counter[str] = Counter()
    for method in methods:
        found.append((color_of(method), DASHES[seen[method] % len(DASHES)]))
        seen[method] += 1
    return found
