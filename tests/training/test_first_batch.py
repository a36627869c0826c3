"""The first batch as text: the mask can be read from it."""

import re

from balora_jax.cli import main
from balora_jax.data.tokenizer import CharTokenizer
from balora_jax.training.first_batch import first_batch


def test_what_is_learned_is_marked(config):
    said = [line.plain for line in first_batch(config)]
    assert said[0].startswith("2 of the 2 rows")
    texts = [line for line in said if line.startswith("text ")]
    assert texts
    for line in texts:
        assert re.fullmatch(r"text \d: <bos>[^\u00ab]+ \u00ab[^\u00bb]+<eos>\u00bb", line), line
    learned = sum(int(count) for count in re.findall(r"(\d+) learned", "".join(said)))
    marked = "".join(re.findall(r"\u00ab(.*?)\u00bb", "".join(texts))).replace("<eos>", ".")
    assert learned == len(marked), "a token is a character"


def test_spelled_text_leaves_out_no_token():
    assert CharTokenizer().spell([1, *CharTokenizer().encode("3 + 4"), 2, 0]) == "<bos>3 + 4<eos><pad>"


def test_show_batch_ends_without_a_run(config, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "tiny.py"
    file.write_text(
        f"from balora_jax.training import *\nconfig = {config!r}\nsweep = {{'method': ('lora', 'balora')}}\n"
    )
    assert main(["run", str(file), "--show-batch"]) == 0
    assert capsys.readouterr().out.count("rows of the first batch") == 1, "both methods see the same"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.py"]
