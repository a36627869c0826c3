import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from balora_jax.models import folders
from balora_jax.models.folders import model_folder


def test_a_folder_goes_before_a_shipped_model_of_its_name(tmp_path, monkeypatch):
    shipped = tmp_path / "shipped"
    for name in ("first", "second"):
        (shipped / name).mkdir(parents=True)
    monkeypatch.setattr(folders, "PRETRAINED", shipped)
    monkeypatch.chdir(tmp_path)
    assert model_folder("second") == shipped / "second"
    (tmp_path / "second").mkdir()
    assert model_folder("second").resolve() == tmp_path / "second"


@pytest.mark.parametrize("offline", [True, False])
def test_it_is_said_that_the_hub_is_asked(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    model_folder("runs/mistyped")
    said = "there is no folder runs/mistyped; asking the Hugging Face hub for it\n"
    assert capsys.readouterr().err == ("" if offline else said)


@pytest.mark.parametrize("name", ["third", "/absent/third", "../absent/third", "two/parts/more", "~/third"])
def test_what_is_no_model_is_refused_without_asking_the_hub(name, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(
        FileNotFoundError, match=f"{name} must be .* shipped model \\(school-math\\) or a name owner/model"
    ):
        model_folder(name)


@pytest.mark.parametrize(("weights", "asked"), [(True, ["model*.safetensors"]), (False, [])])
def test_a_name_on_the_hub_is_fetched(weights, asked, tmp_path, monkeypatch):
    def fetch(name, *, allow_patterns):
        assert name == "owner/model-2.5_x"
        assert allow_patterns == ["*.json", "*.jinja", *asked]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert model_folder("owner/model-2.5_x", weights=weights) == tmp_path


def test_a_hub_that_does_not_answer_gives_one_line(monkeypatch):
    def fail(name, **options):
        raise LocalEntryNotFoundError("no network\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"owner/model is no folder, and the .* hub .* name: no network$"):
        model_folder("owner/model")


def test_offline_the_hub_is_not_asked(tmp_path):
    command = [sys.executable, "-m", "balora_jax.cli", "generate", "owner/model", "--offline", "--prompt", "a"]
    environment = {"HF_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu", "HF_ENDPOINT": "http://127.0.0.1:1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    said = "balora-jax: error: MODEL: owner/model is no folder, and the Hugging Face hub does not give a model"
    assert result.stderr.startswith(said)
    assert "set 'HF_HUB_OFFLINE=0'" in result.stderr
    assert result.stderr.count("\n") == 1
