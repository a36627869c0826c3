"""`balora-jax compare`: its table, CSV file and figure, and its mistakes in one line."""

import csv

import pytest
from recorded_runs import LOSSES, write_run
from scipy import stats

from balora_jax.cli import main

RANKS = {(method, 4 * rank): (1 / rank, 1.1 / rank, 1.2) for method in ("lora", "balora") for rank in (1, 2)}


def test_table_and_files_of_a_run(tmp_path, capsys):
    folder = write_run(tmp_path / "x")
    files = [f"--{kind}={tmp_path / kind}" for kind in ("csv", "figure")]
    assert main(["compare", str(folder), "--reference", "balora", *files]) == 0
    out = capsys.readouterr().out
    assert "(edge of" in out
    assert "+0.2000 ±" in out
    assert "1 of 3" in out  # of lora's cells has a diverged run
    assert "corrected by Holm's method for 1 comparison, 5 % in all" in " ".join(out.split())
    assert "Not told apart from balora by these seeds: lora" in out
    balora, lora = csv.DictReader((tmp_path / "csv").read_text().splitlines())
    low, high = stats.ttest_rel(LOSSES["lora", 0.2], LOSSES["balora", 0.1]).confidence_interval(0.95)
    assert [float(lora["low"]), float(lora["high"])] == pytest.approx([low, high])
    assert (lora["optimizer.learning_rate"], lora["diverged_cells"], lora["diverged_runs"]) == ("0.2", "1", "1")
    assert (balora["difference"], balora["on_edge"]) == ("", "optimizer.learning_rate")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("by", [["adapter.rank"], ["adapter.rank", "training.steps"]])
def test_by_fields(by, tmp_path, capsys):
    folders = [
        write_run(tmp_path / str(steps), RANKS, field="adapter.rank", changes={"training.steps": steps})
        for steps in (100, 200)[: len(by)]
    ]
    flags = [part for name in by for part in ("--by", name)]
    assert main(["compare", *map(str, folders), *flags, "--figure", str(tmp_path / "by.pdf")]) == 0
    assert f"for {2 * len(folders)} comparisons" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "by.pdf").read_bytes().startswith(b"%PDF")


def test_mistakes(tmp_path, fails):
    folder = write_run(tmp_path / "x")
    assert "compare needs run directories: balora-jax compare RUN ..." in fails("compare")
    assert "must be the output of a finished run" in fails("compare", tmp_path / "none")
    assert "RUN: " in fails("compare", folder, folder)
    assert "--by must be a field in which the runs differ" in fails("compare", folder, "--by", "adapter.rank")
    assert "--csv: " in fails("compare", folder, "--csv", tmp_path / "none" / "x.csv")
