"""Folders of commands: whole or not at all, none of others' deleted, and nothing from outside copied."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError

from balora_jax.cli import main
from balora_jax.commands.folders import copy_other_files, whole_folder
from balora_jax.errors import ConfigError


def test_a_folder_appears_whole_with_the_usual_permissions(tmp_path):
    (tmp_path / "usual").mkdir()
    for name in ("a/b/out", "x" * 250):
        with whole_folder(tmp_path / name) as folder:
            (folder / "file").write_text("content")
            (folder / "file").chmod(0o600)
            assert not (tmp_path / name).exists()
        assert (tmp_path / name / "file").read_text() == "content"
        mode = (tmp_path / "usual").stat().st_mode
        assert (tmp_path / name).stat().st_mode == mode
        assert (tmp_path / name / "file").stat().st_mode & 0o777 == mode & 0o666
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "usual", "x" * 250]


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write .*out: No space left"),
        (SafetensorError("I/O error: No space left"), "cannot write .*out: I/O error: No space left"),
        (KeyboardInterrupt(), "^$"),
        (TypeError("mistake"), "mistake"),
    ],
)
def test_an_error_leaves_nothing_and_takes_nothing(error, shown, tmp_path):
    others = tmp_path / f".out.{os.getpid()}.tmp"
    others.mkdir()
    (others / "file").touch()

    def fail():
        with whole_folder(tmp_path / "out") as folder:
            (folder / "part").touch()
            raise error

    expected = ConfigError if isinstance(error, OSError | SafetensorError) else type(error)
    with pytest.raises(expected, match=shown):
        fail()
    assert list(tmp_path.iterdir()) == [others]
    assert (others / "file").exists()


def test_links_out_of_a_folder_are_not_copied(model_folder, adapter, tmp_path, fails):
    (tmp_path / "secret").write_text("secret")
    for source, name in ((model_folder, "model"), (adapter, "adapter")):
        shutil.copytree(source, tmp_path / name)
    for folder, link, target in (
        ("model", "notes.txt", tmp_path / "secret"),
        ("model", "tokenizer_config.json", "../secret"),
        ("adapter", "README.md", "../../../../../../../../etc/hostname"),
    ):
        (tmp_path / folder / link).unlink(missing_ok=True)
        (tmp_path / folder / link).symlink_to(target)
        command = ["merge", tmp_path / "model", adapter] if folder == "model" else ["balance", tmp_path / "adapter"]
        message = fails(*command, tmp_path / "out")
        assert f"{folder}/{link} is a link to " in message
        assert not (tmp_path / "out").exists()
        (tmp_path / folder / link).unlink()
    (tmp_path / "model" / "inside.txt").symlink_to("config.json")
    assert main(["merge", str(tmp_path / "model"), str(adapter), str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "inside.txt").is_symlink()


def test_links_within_the_cache_of_the_hub_are_copied(tmp_path):
    cache = tmp_path / "hub" / "models--a--b"
    folder = cache / "snapshots" / "0123"
    folder.mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "4567").write_text("{}")
    (folder / "config.json").symlink_to("../../blobs/4567")
    (tmp_path / "to").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for source in (folder, tmp_path / "link"):
        copy_other_files(source, tmp_path / "to")
        assert (tmp_path / "to" / "config.json").read_text() == "{}"
    other = tmp_path / "hub" / "models--c--d" / "blobs"
    other.mkdir(parents=True)
    (other / "89").write_text("another's")
    (folder / "notes.txt").symlink_to("../../../models--c--d/blobs/89")
    with pytest.raises(ConfigError, match=r"0123/notes.txt is a link to .*d/blobs/89"):
        copy_other_files(folder, tmp_path / "to")


def test_an_output_that_cannot_be_written():
    """A full disk behind the standard output, and a reader of it that has gone."""

    def run(output):
        command = [sys.executable, "-m", "balora_jax.cli", "--help"]
        done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        return done.returncode, done.stderr

    with open("/dev/full", "w") as full:
        assert run(full) == (2, "balora-jax: error: the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    assert run(writer) == (1, "")
    os.close(writer)
