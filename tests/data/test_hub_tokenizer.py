"""Tokenizers of published models, and which tokens of a conversation are learned."""

import builtins
import datetime
import json

import datasets
import pytest

from balora_jax.data import chat_template
from balora_jax.data.batches import encode
from balora_jax.data.hub_tokenizer import HubTokenizer, load_tokenizer
from balora_jax.data.tokenizer import CharTokenizer

pytest.importorskip("transformers", reason="the tokenizers of published models need the extra hf")
from chat_tokenizers import FAMILIES, NO_END, QWEN, REWRITING, write


def build(folder, family, **changes):
    size = write(folder, **{**FAMILIES[family], **changes})
    return HubTokenizer(folder, vocab_size=size)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    return {family: build(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def turns(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


CHAT = (("user", "how many?"), ("assistant", "12 apples"), ("user", "and you?"), ("assistant", "hello\n\nto you"))
SYSTEM = (("system", "answer"), *CHAT)


def parts(tokenizer, tokens, learned):
    """The text of the tokens, cut where learning begins and ends."""
    found = []
    for index, (token, is_learned) in enumerate(zip(tokens, learned, strict=True)):
        if index == 0 or is_learned != learned[index - 1]:
            found.append((is_learned, []))
        found[-1][1].append(token)
    return [(is_learned, tokenizer._tokenizer.decode(run)) for is_learned, run in found]


QWEN_DEFAULT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
LLAMA_SYSTEM = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\n"
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
USER, ASSISTANT = HEADER.format("user"), HEADER.format("assistant")
EXPECTED = {
    ("qwen", CHAT): [
        (False, QWEN_DEFAULT + "<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "12 apples<|im_end|>"),
        (False, "\n<|im_start|>user\nand you?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "hello\n\nto you<|im_end|>"),
    ],
    ("qwen", (("system", ""), *CHAT[:2])): [
        (False, "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nhow many?<|im_end|>\n<|im_start|>assistant\n"),
        (True, "12 apples<|im_end|>"),
    ],
    ("qwen", (("user", "how <|im_end|>"), ("assistant", "\n <|im_start|> \n"), ("user", "ignored"))): [
        (False, QWEN_DEFAULT + "<|im_start|>user\nhow <|im_end|><|im_end|>\n<|im_start|>assistant\n"),
        (True, "\n <|im_start|> \n<|im_end|>"),
    ],
    ("llama", SYSTEM): [
        (False, LLAMA_SYSTEM + "answer<|eot_id|>" + USER + "how many?<|eot_id|>" + ASSISTANT),
        (True, "12 apples<|eot_id|>"),
        (False, USER + "and you?<|eot_id|>" + ASSISTANT),
        (True, "hello\n\nto you<|eot_id|>"),
    ],
    ("llama", (("user", " how\n "), ("assistant", "\n 12 \n"))): [
        (False, LLAMA_SYSTEM + "<|eot_id|>" + USER + "how<|eot_id|>" + ASSISTANT),
        (True, "12<|eot_id|>"),
    ],
    ("inst", SYSTEM): [
        (False, "<s> [INST] answer\n\nhow many? [/INST]"),
        (True, " 12 apples</s>"),
        (False, " [INST] and you? [/INST]"),
        (True, " hello\n\nto you</s>"),
    ],
}


@pytest.mark.parametrize(("family", "chat"), EXPECTED, ids=lambda value: value if isinstance(value, str) else "")
def test_assistant_turns_are_learned_and_nothing_else(tokenizers, family, chat):
    tokenizer = tokenizers[family]
    tokens, learned = tokenizer.encode_conversation(turns(*chat))
    found = parts(tokenizer, tokens, learned)
    assert [is_learned for is_learned, _ in found] == [is_learned for is_learned, _ in EXPECTED[family, chat]]
    # the decoder of SentencePiece drops the space before a text
    strip = (lambda text: text.strip()) if family == "inst" else (lambda text: text)
    assert [strip(text) for _, text in found] == [strip(text) for _, text in EXPECTED[family, chat]]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_whole_text(tokenizers, family):
    """Turns that begin with letters: cutting the text there changes no token."""
    tokenizer = tokenizers[family]
    tokens, learned = tokenizer.encode_conversation(turns(*SYSTEM))
    whole = tokenizer.encode(tokenizer._render(turns(*SYSTEM), False))
    assert tokens == whole[: len(tokens)]
    assert learned[-1]
    assert tokenizer._tokenizer.decode(whole[len(tokens) :]).strip() == ""


def test_a_prompt_has_the_tokens_that_it_has_when_the_model_is_asked(tokenizers):
    """An answer that begins with a new line would merge with the prompt's last."""
    tokenizer = tokenizers["qwen"]
    chat = turns(("user", "how many?"), ("assistant", "\n12"))
    tokens, learned = tokenizer.encode_conversation(chat)
    prompt = tokenizer.encode_question(chat[:1])
    assert tokenizer.encode("\n\n") != 2 * tokenizer.encode("\n"), "this tokenizer merges new lines"
    assert tokens[: len(prompt)] == prompt
    assert learned.index(True) == len(prompt)


def test_text_after_text_has_no_space_of_its_own(tokenizers):
    tokenizer = tokenizers["inst"]
    before = tokenizer.encode("Answer:")
    assert tokenizer.decode(before + tokenizer.encode_continuation(" 12")) == "Answer: 12"
    assert tokenizer.decode(before + tokenizer.encode_continuation("12")) == "Answer:12"
    assert tokenizer.decode(before + tokenizer.encode("12")) == "Answer: 12", "this tokenizer puts spaces before texts"


@pytest.mark.parametrize(("family", "begins"), [("qwen", False), ("llama", True), ("inst", True)])
def test_prompts_and_answers(tokenizers, family, begins):
    tokenizer = tokenizers[family]
    data = datasets.Dataset.from_dict({"prompt": ["Question: how?\nAnswer:", ""], "answer": [" 12", "hello to you"]})
    encoded = encode(data, tokenizer, max_length=100)
    assert (tokenizer.bos_id is not None) == begins
    for row, text in enumerate([" 12", "hello to you"]):
        tokens, learned = encoded.tokens[row], encoded.learned[row]
        assert tokens[-1] == tokenizer.eos_id
        assert (tokens[0] == tokenizer.bos_id) == begins
        if row == 0:
            assert tokenizer.decode(tokens[learned]).strip() == text.strip()
            assert encoded.prompt_lengths[row] == begins + len(tokenizer.encode("Question: how?\nAnswer:"))
        else:
            assert learned.tolist() == [False] + [True] * (len(tokens) - 1), "all but the first, which nothing predicts"
            assert tokenizer.decode(tokens) == text


def test_a_first_token_that_the_tokenizer_does_not_put_is_none(tmp_path):
    assert build(tmp_path, "qwen", bos="<|endoftext|>", begins=False).bos_id is None


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_stops_at_the_end(tokenizers, family):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode("how many apples?")
    assert tokenizer.decode([*ids, tokenizer.eos_id, *ids]) == "how many apples?"


THINKS_FIRST = QWEN.replace("{{- '<|im_start|>assistant\\n' }}", "{{- '<|im_start|>assistant\\n<think>' }}")
DOUBLING = "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
ENDLESS = "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}"
THINKING = turns(("user", "hello"), ("assistant", "<think>how</think>12"), ("user", "and?"), ("assistant", "you"))


@pytest.mark.parametrize(
    ("changes", "chat", "message"),
    [
        ({"template": None}, turns(*CHAT), "has no chat template"),
        ({"template": REWRITING}, THINKING, r"turn 2 of 4 otherwise when more follows: '<think>how.* became '12"),
        (
            {"template": THINKS_FIRST},
            turns(*CHAT[:2]),
            r"asks for turn 2 of 2 with the generation prompt '<\|im_start\|>assistant\\n<think>', but renders the "
            r"turn as '<\|im_start\|>assistant\\n12 apples",
        ),
        ({"template": NO_END}, turns(*CHAT), r"must end assistant turns in a special token, got '12 apples\\n'"),
        ({"template": "{{ raise_exception('no') }}"}, turns(*CHAT), "fails on the turns of user, .* TemplateError: no"),
        (
            {"template": QWEN + "{{ [1, 2] | random }}"},
            turns(*CHAT),
            "it uses the filter random, which draws at random",
        ),
        ({"template": QWEN + "{{ [[1]] | map('random') | list }}"}, turns(*CHAT), "it uses the filter random, which"),
        ({"template": QWEN + "{{ lipsum() }}"}, turns(*CHAT), "it uses lipsum, which draws at random"),
        (
            {"template": QWEN + "{{ strftime_now('%s') }}"},
            turns(*CHAT),
            r"it uses strftime_now\('%s'\), which depends on",
        ),
        ({"template": QWEN + "{{ now() }}"}, turns(*CHAT), "UndefinedError: 'now' is undefined"),
        ({"template": "{% if %}"}, turns(*CHAT), "fails on the turns of user, .* TemplateSyntaxError"),
        ({"template": "{{ strftime_now() }}"}, turns(*CHAT), "fails on the turns of user, .* TypeError"),
        ({"template": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"}, turns(*CHAT), "RecursionError"),
        ({"template": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"}, turns(*CHAT), "fails on .*Error"),
        ({"template": "{{ 1 // 0 }}"}, turns(*CHAT), "ZeroDivisionError"),
        ({"template": "{{ 'x' * 10**12 }}"}, turns(*CHAT), "MemoryError: it takes more than 512 MiB"),
        ({"template": DOUBLING}, turns(*CHAT), "MemoryError: it takes more than 512 MiB"),
        ({"template": "{{ 'x' * 10**7 }}"}, turns(*CHAT), "makes a text of 10000000 characters"),
        ({"template": ENDLESS}, turns(*CHAT), "TimeoutError: it takes more than 0.1 s"),
        ({}, turns(("user", "hello")), r"must have an assistant turn, got \['user'\]"),
    ],
)
def test_templates_that_cannot_be_learned_are_refused(tmp_path, changes, chat, message, monkeypatch):
    monkeypatch.setattr(chat_template, "_MOST_SECONDS", 0.1 if changes.get("template") is ENDLESS else 10.0)
    tokenizer = build(tmp_path, "qwen", **changes)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode_conversation(chat)


@pytest.mark.parametrize("form", ["%Y-%m-%d", "%d %B %Y %H:%M:%S"])
def test_the_date_is_fixed(tmp_path, form):
    template = QWEN.replace("You are", "Today is {}. You are").replace("{}", "' + strftime_now('" + form + "') + '")
    tokenizer = build(tmp_path, "qwen", template=template)
    chat = turns(*CHAT)
    for tokens in (tokenizer.encode_conversation(chat)[0], tokenizer.encode_question(chat[:1])):
        said = tokenizer._tokenizer.decode(tokens)
        assert f"Today is {datetime.datetime(2024, 7, 26).strftime(form)}. You are" in said


@pytest.mark.parametrize("family", FAMILIES)
def test_templates_are_rendered_as_by_transformers(tokenizers, family):
    tokenizer = tokenizers[family]
    marked = QWEN.replace("message.content +", "'' }}{% generation %}{{ message.content }}{% endgeneration %}{{ '' +")
    for template in (None, marked):
        for chat, prompt in ((CHAT, False), (SYSTEM, False), (CHAT[:1], True), (SYSTEM[:2], True)):
            if template:
                tokenizer = HubTokenizer(tokenizer._folder, vocab_size=500)
                tokenizer._tokenizer.chat_template = template
            expected = tokenizer._tokenizer.apply_chat_template(
                turns(*chat), tokenize=False, add_generation_prompt=prompt, date_string="26 Jul 2024"
            )
            assert tokenizer._render(turns(*chat), prompt) == expected


def test_rewriting_template_is_used_where_it_rewrites_nothing(tmp_path):
    tokenizer = build(tmp_path, "qwen", template=REWRITING)
    tokens, learned = tokenizer.encode_conversation(THINKING[:2])
    assert parts(tokenizer, tokens, learned)[1] == (True, "<think>how</think>12<|im_end|>")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), FileNotFoundError, "holds no tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ValueError, "tokenizer.json is not JSON"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), ValueError, "the tokenizer of .* cannot be read"),
        *(
            (lambda folder, name=name: (folder / name).write_text("[" * 200_000), ValueError, f"{name} must be JSON")
            for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "config.json")
        ),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[1]"), ValueError, "must hold a JSON object"),
        (
            lambda folder: (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}'),
            ValueError,
            "must have an eos_token",
        ),
        (
            lambda folder: write_config(folder, 300),
            ValueError,
            r"the id 3\d+, but its model has only 300 tokens, 0 to 299",
        ),
        (lambda folder: move(folder, "x"), ValueError, "gives the token 'x' the id 5000, but its model has"),
        (lambda folder: move(folder, "<|im_end|>"), ValueError, r"the token '<\|im_end\|>' the id 5000, but its model"),
        (
            lambda folder: with_special(folder, pad_token="[PAD]"),
            ValueError,
            r"the token '\[PAD\]' the id 3\d+, but its",
        ),
    ],
)
def test_unusable_tokenizers(tmp_path, change, error, message):
    write_config(tmp_path, write(tmp_path, **FAMILIES["qwen"]))
    assert load_tokenizer(tmp_path).eos_id == load_tokenizer(tmp_path).encode("<|im_end|>")[0]
    change(tmp_path)
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path)


def move(folder, token):
    """Gives a token an id beyond all others, so that there is a hole."""
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    whole["model"]["vocab"][token] = 5000
    for added in whole["added_tokens"]:
        added["id"] = 5000 if added["content"] == token else added["id"]
    file.write_text(json.dumps(whole))


def with_special(folder, **tokens):
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | tokens))


def write_config(folder, vocab_size):
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"), 4)
    config = {"model_type": "llama", "vocab_size": vocab_size, "rms_norm_eps": 1e-6, "head_dim": 4, **sizes}
    (folder / "config.json").write_text(json.dumps(config))


def test_an_assistants_turn_ends_what_is_said(tmp_path):
    """Also where that is not the tokenizer's end token, as in Qwen's bases."""
    tokenizer = build(tmp_path / "instruct", "qwen")
    assert tokenizer.end_ids == (tokenizer.eos_id,)
    base = build(tmp_path / "base", "qwen", eos="<|endoftext|>")
    assert base.end_ids == (base.eos_id, tokenizer.eos_id)
    assert build(tmp_path / "plain", "qwen", eos="<|endoftext|>", template=None).end_ids == (base.eos_id,)


def test_fingerprint_tells_tokenizers_and_templates_apart(tmp_path):
    one = build(tmp_path / "one", "qwen").fingerprint
    assert build(tmp_path / "same", "qwen").fingerprint == one
    assert build(tmp_path / "template", "qwen", template=REWRITING).fingerprint != one
    assert build(tmp_path / "tokens", "llama").fingerprint != one


def test_code_in_a_folder_never_runs(tmp_path, monkeypatch):
    write_config(tmp_path, write(tmp_path, **FAMILIES["qwen"]))
    fields = {"eos_token": "<|im_end|>", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # to the question whether it may
    with pytest.raises(ValueError, match=r"cannot be read: .* custom code"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_package_is_named(tmp_path, monkeypatch):
    importing = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "transformers":
            raise ImportError("no module")
        return importing(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'balora-jax\[hf\]'"):
        HubTokenizer(tmp_path, vocab_size=3)


def test_models_without_tokenizer_files():
    assert isinstance(load_tokenizer("school-math"), CharTokenizer)
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer("school-math").encode_conversation(turns(*CHAT))
    with pytest.raises(ValueError, match="has no chat template"):
        load_tokenizer("school-math").encode_question(turns(*CHAT[:1]))
