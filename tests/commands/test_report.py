"""`balora-jax report`, and the report at the end of a run."""

import pytest
from recorded_runs import write_run

from balora_jax.cli import main
from balora_jax.training.report import is_available


@pytest.mark.skipif(not is_available(), reason="plotly is not installed")
def test_report_is_written_where_it_is_asked_for(tmp_path, capsys):
    folder = write_run(tmp_path / "x")
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"report: {folder / 'report.html'}\n"
    assert main(["report", str(folder), "--output", str(tmp_path / "y.html"), "--reference", "balora"]) == 0
    assert "less balora" in (tmp_path / "y.html").read_text()
    assert "less lora" in (folder / "report.html").read_text()


@pytest.mark.skipif(not is_available(), reason="plotly is not installed")
def test_run_ends_with_a_report(run):
    page = (run / "report.html").read_text()
    assert "2 runs, 0 of them diverged" in page
    assert "balora-jax" in page


def test_mistakes(tmp_path, fails, monkeypatch):
    folder = write_run(tmp_path / "x")
    assert "report needs run directories" in fails("report")
    assert "a report of several run directories needs --output FILE" in fails("report", folder, folder)
    assert "must be the output of a finished run" in fails("report", tmp_path / "none")
    if is_available():
        assert "--output: " in fails("report", folder, "--output", tmp_path / "none" / "x.html")
    monkeypatch.setattr("balora_jax.training.report.is_available", lambda: False)
    assert "a report needs plotly: pip install 'balora-jax[report]'" in fails("report", folder)
