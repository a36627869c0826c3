"""Whole runs on published data sets, with a model that brings its own tokenizer."""

import dataclasses
import json
import shutil

import datasets
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

from balora_jax.data.hub_tokenizer import load_tokenizer
from balora_jax.data.recipes import DataSettings
from balora_jax.models import Decoder
from balora_jax.models.config_json import read_config
from balora_jax.models.weights import save_decoder
from balora_jax.training import ConfigError, EvaluationSettings, ModelSettings, run
from balora_jax.training.first_batch import first_batch
from balora_jax.training.loading import load_data, load_evaluation

pytest.importorskip("transformers", reason="the tokenizers of published models need the extra hf")
from chat_tokenizers import FAMILIES, write


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("qwen")
    size = write(folder, **FAMILIES["qwen"])
    save_decoder(Decoder(dataclasses.replace(read_config(model_folder), vocab_size=size), rngs=nnx.Rngs(0)), folder)
    return str(folder)


ROWS = {
    "alpaca": lambda i: {"instruction": f"say {i}", "input": "", "output": f"hello {i}" + " you" * (60 * (i == 3))},
    "gsm8k": lambda i: {"question": f"{i} + 1?", "answer": f"so\n#### {i + 1}"},
    "wikitext": lambda i: {"text": f" the model {i} says \n"},
    "arc": lambda i: {
        "question": f"{i}?",
        "choices": {"text": ["hello", "you"], "label": ["A", "B"]},
        "answerKey": "AB"[i % 2],
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    for name, row in ROWS.items():
        lines = [json.dumps(row(i)) for i in range(24)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def settings(files, recipe, **changes):
    values = {"recipe": recipe, "path": str(files / f"{recipe}.jsonl"), "train_examples": None, "eval_examples": 6}
    return DataSettings(**{**values, "length": 96, **changes})


@pytest.mark.parametrize("recipe", ["alpaca", "gsm8k", "arc"])
def test_run_leaves_loss_and_score(recipe, config, qwen, files, tmp_path):
    training = dataclasses.replace(config.training, steps=2, eval_every=2, max_new_tokens=5)
    model = ModelSettings(path=qwen)
    config = dataclasses.replace(config, model=model, data=settings(files, recipe), training=training)
    console = Console(record=True, width=200)
    (row,) = run(config, {}, tmp_path / "out", console)
    assert 3 < row["evaluation_loss"]["mean"] < 8, "about the logarithm of the number of tokens"
    scored = recipe in ("gsm8k", "arc")
    assert (row["accuracy"] is not None) == scored
    lines = (tmp_path / "out" / "results.txt").read_text().splitlines()
    line = next(line for line in lines if line.strip().startswith("lora"))
    assert (" - " in line) == (not scored)
    name = {"gsm8k": "same final answer", "arc": "right choice", "alpaca": "right answers"}[recipe]
    assert f"evaluation loss   {name}   n" in next(line for line in lines if "evaluation loss" in line)
    assert "±" not in "".join(lines), "one seed has no spread"
    assert "seeds" not in "".join(lines)
    assert row["evaluation_loss"]["std"] is None
    assert ("skipped 1 training examples of more than 96 tokens" in console.export_text()) == (recipe == "alpaca")


def test_packed_conversations_are_learned_as_alone(qwen, files):
    """Rows hold the same tokens and the same masks packed and padded, with positions from 0 for each."""
    packed, alone = (
        load_data(settings(files, "alpaca", packing=packing, length=300), qwen)[0].arrays() for packing in (True, False)
    )
    assert len(packed["tokens"]) < len(alone["tokens"]) / 2

    def texts(arrays):
        found = []
        names = ("tokens", "positions", "segment_ids", "loss_mask")
        for tokens, positions, segments, mask in zip(*(arrays[name] for name in names), strict=True):
            for segment in range(1, segments.max() + 1):
                where = segments == segment
                assert positions[where].tolist() == list(range(where.sum()))
                found.append((tokens[where].tolist(), mask[where].tolist()))
        return sorted(found)

    assert texts(packed) == texts(alone)
    longest = max(len(tokens) for tokens, _ in texts(alone))
    assert packed["tokens"].shape[1] == 300
    assert longest <= alone["tokens"].shape[1] == -(-longest // 64) * 64 < 300
    tokenizer = load_tokenizer(qwen)
    tokens, mask = texts(alone)[0]
    said = tokenizer.decode(np.asarray(tokens)[mask])
    assert said.startswith("hello ")
    assert np.asarray(tokens)[mask][-1] == tokenizer.eos_id


def test_nothing_is_predicted_across_texts_of_a_row(qwen, files):
    """Lines have no prompt and this tokenizer no first token: what begins a line has nothing to be predicted from."""
    arrays = load_data(settings(files, "wikitext"), qwen)[0].arrays()
    starts = (arrays["positions"] == 0) & (arrays["segment_ids"] > 0)
    assert arrays["segment_ids"].max() > 1
    assert not arrays["loss_mask"][starts].any()
    assert arrays["loss_mask"][(arrays["positions"] > 0)].all()


def test_a_text_that_is_cut_is_not_left_out(qwen, files):
    whole, _, _ = load_data(settings(files, "wikitext"), qwen)
    cut, examples, notes = load_data(settings(files, "wikitext", length=5), qwen)
    assert not any("skipped" in note for note in notes["training"] + notes["evaluation"])
    assert cut.arrays()["loss_mask"].sum() == whole.arrays()["loss_mask"].sum()
    assert examples.arrays["tokens"].shape[1] == 5


def test_examples_that_are_asked_for_and_not_there_are_told(qwen, files):
    (lacking,) = load_data(settings(files, "gsm8k", train_examples=50), qwen)[2]["training"]
    assert lacking == "50 training examples asked for (data.train_examples), 18 there"
    notes = load_data(settings(files, "alpaca", train_examples=18), qwen)[2]
    assert [note for kind in notes.values() for note in kind] == ["skipped 1 training examples of more than 96 tokens"]


def test_turns_of_the_assistant_are_marked(config, qwen, files):
    config = dataclasses.replace(config, model=ModelSettings(path=qwen), data=settings(files, "alpaca"))
    texts = [line.plain for line in first_batch(config) if line.plain.startswith("text ")]
    for text in texts:
        number = text.split("user\nsay ")[1].split("<")[0]
        assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n\u00abhello {number}<|im_end|>\u00bb")


def test_conversations_need_a_chat_template(config, files):
    with pytest.raises(ConfigError, match="has no chat template, which conversations need"):
        load_data(settings(files, "alpaca"), config.model.path)


def test_another_models_tokenizer_can_be_taken(qwen, files, tmp_path):
    """As an instruct model's, with its chat template, for a base without; its folder need hold nothing else."""
    base, instruct = tmp_path / "base", tmp_path / "instruct"
    shutil.copytree(qwen, base)
    instruct.mkdir()
    for file in [file for file in base.iterdir() if file.name.startswith(("tokenizer", "chat_template"))]:
        file.rename(instruct / file.name)
    with pytest.raises(ConfigError, match=r"model\.path: .*base holds no tokenizer\.json"):
        load_data(settings(files, "alpaca"), str(base))
    found, expected = (
        load_data(settings(files, "alpaca", tokenizer=tokenizer), model)[0].arrays()
        for model, tokenizer in ((str(base), str(instruct)), (qwen, None))
    )
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .* the id \d+, but its model has only 98 tokens, 0 to 97"):
        load_data(settings(files, "alpaca", tokenizer=str(instruct)))
    with pytest.raises(ConfigError, match=r"data\.tokenizer: no-such must be a model folder"):
        load_data(settings(files, "alpaca", tokenizer="no-such"))


def test_tokens_are_cached(qwen, files, monkeypatch, tmp_path):
    from balora_jax.data.hub_tokenizer import HubTokenizer

    arrays = load_data.__wrapped__(settings(files, "alpaca"), qwen)[0].arrays()

    def unexpected(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(HubTokenizer, "encode_conversation", unexpected)
    again = load_data.__wrapped__(settings(files, "alpaca", length=300, packing=False), qwen)
    assert len(again[0]) == 18, "the long example fits now"
    same = load_data.__wrapped__(settings(files, "alpaca"), qwen)[0].arrays()
    assert all((same[name] == arrays[name]).all() for name in arrays)
    shutil.copy(files / "alpaca.jsonl", tmp_path / "copy.jsonl")  # another file of the same rows
    load_data.__wrapped__(settings(files, "alpaca", path=str(tmp_path / "copy.jsonl")), qwen)
    with pytest.raises(AssertionError, match="tokenised again"):
        load_data.__wrapped__(settings(files, "alpaca", seed=1), qwen)


def test_an_evaluation_set_without_splits_is_used_whole(files, qwen, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(json.dumps(ROWS["gsm8k"](i)) + "\n" for i in range(9)))
    whole = EvaluationSettings("mine", "gsm8k", path=str(file), examples=None)
    data = settings(files, "alpaca")
    examples, notes = load_evaluation(whole, data, qwen)
    assert len(set(examples.prompts)) == 9
    assert notes == []
    assert load_evaluation(dataclasses.replace(whole, examples=20), data, qwen)[1] == [
        "mine: 20 examples asked for, 9 there"
    ]
    held_out = settings(files, "gsm8k", path=str(file), train_examples=None, eval_examples=2)
    assert load_evaluation(whole, held_out, qwen)[1] == ["mine: 7 of its questions are training examples too"]
    with pytest.raises(ConfigError, match=r"evaluations, mine: data\.eval_split must be a split of the data"):
        load_evaluation(dataclasses.replace(whole, split="test"), data, qwen)


def test_sets_of_all_kinds_beside_one_that_has_no_answers(config, qwen, files, tmp_path):
    """Conversations are trained on; free answers, choices and bare text are evaluated on too."""
    sets = tuple(
        EvaluationSettings(f"my {recipe}", recipe, path=str(files / f"{recipe}.jsonl"), examples=3)
        for recipe in ("gsm8k", "arc", "wikitext")
    )
    training = dataclasses.replace(config.training, steps=2, eval_every=1, max_new_tokens=5, select="best")
    model = ModelSettings(path=qwen)
    data = settings(files, "alpaca")
    config = dataclasses.replace(config, model=model, data=data, training=training, evaluations=sets)
    (row,) = run(config, {}, tmp_path / "out", Console(quiet=True))
    assert row["accuracy"] is None
    scores = {name: (found["score"], found["accuracy"] is not None) for name, found in row["others"].items()}
    assert scores == {
        "my gsm8k": ("same final answer", True),
        "my arc": ("right choice", True),
        "my wikitext": (None, False),
    }
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [answer["evaluation"] for answer in answers] == ["my gsm8k"] * 3 + ["my arc"] * 3
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(f"Loss on my {name} over steps" in page for name in ("gsm8k", "arc", "wikitext"))
