"""Writes recorded results into the READMEs and `docs/`, between `<!-- results: NAME -->` and `<!-- end -->`.

    python experiments/update_readme.py [--check]

NAME is a folder beside this script with a `results.json`, a file `NAME.md` in such a folder (`comparison/methods`), or
a file `benchmarks/recorded/NAME.md`. With `--check` nothing is written, and the exit code is 1 if a page does not
show what is recorded.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
HEADER = "| method | best cell | evaluation loss | {} | n | balancing gap | ms / step | diverged |"


def recorded(name: str) -> str:
    """Returns what is recorded under a name, as Markdown."""
    for folder in (HERE.parent / "benchmarks" / "recorded", HERE):
        if (file := folder / f"{name}.md").exists():
            return file.read_text().rstrip()
    return markdown(HERE / name)


def markdown(folder: Path) -> str:
    """Returns the table of a recorded run."""
    results = json.loads((folder / "results.json").read_text())
    scores = {row.get("score", "exact match") for row in results if row.get("accuracy")}
    header = HEADER.format(scores.pop() if len(scores) == 1 else "right answers")
    rows = [header, "|---|---|---|---|---|---|---|---|"]
    for row in results:
        cells = [row["population"]]
        if "best" in row:
            best = (f"{k.rsplit('.', 1)[-1].replace('_', ' ')} {v:g}" for k, v in row["best"].items())
            loss, accuracy, gap = row["evaluation_loss"], row["accuracy"], row.get("gap_mean")
            cells += [
                ", ".join(best) + (" (edge of the grid)" if row["on_edge"] else ""),
                spread(loss, ".4f"),
                spread(accuracy, ".1f", 100) + " %" if accuracy else "-",
                str(row["n"]),
                "-" if gap is None else f"{gap['mean']:.0e}",
            ]
        else:
            cells += ["every cell diverged", "", "", "0", ""]
        cells += [f"{1000 * row['step_seconds']:.0f}", f"{row['diverged']} of {row['runs']}"]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def spread(values: dict, form: str, factor: float = 1) -> str:
    """Returns a mean with its standard deviation, which one value has not."""
    numbers = [factor * values[name] for name in ("mean", "std") if values[name] is not None]
    return " ± ".join(format(number, form) for number in numbers)


def main() -> int:
    """Writes or checks the pages; returns the exit code."""
    stale, pages = 0, (README, *sorted(HERE.glob("*/README.md")), *sorted((HERE.parent / "docs").glob("*.md")))
    for page in pages:
        old = page.read_text()
        new = re.sub(
            r"(<!-- results: ([\w/-]+) -->\n).*?(<!-- end -->)",
            lambda match: f"{match[1]}{recorded(match[2])}\n{match[3]}",
            old,
            flags=re.DOTALL,
        )
        stale += new != old
        if "--check" not in sys.argv[1:]:
            page.write_text(new)
    filled = any("<!-- results: " in page.read_text() for page in pages)
    return int("--check" in sys.argv[1:] and (stale > 0 or not filled))


if __name__ == "__main__":
    sys.exit(main())
