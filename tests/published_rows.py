"""Rows with the columns of the published data sets, and files of them."""

import json

import datasets


def alpaca(i):
    return {
        "instruction": f"Name {i} colours.",
        "input": "" if i % 2 else "warm ones",
        "output": f"colour {i}" if i else "",
        "text": "unused",
    }


def codefeedback(i):
    return {"query": f"write {i}", "answer": f"print({i})", "resource": "evol", "lang": "python"}


def openhermes(i):
    return {"instruction": f"hello {i}", "input": "and?" if i % 2 else "", "output": f"bye {i}", "category": None}


def openhermes_v2(i):
    turns = [("system", "be kind"), ("human", f"hello {i}"), ("gpt", "hi"), ("human", "and?"), ("gpt", f"bye {i}")]
    turns = turns[1:] if i % 2 else turns
    turns = {1: turns[:1], 4: turns[2:]}.get(i, turns)  # no answer, and an answer without a question
    conversation = [{"from": role, "value": text, "weight": None} for role, text in turns]
    return {"conversations": conversation, "source": "unused", "category": None}


def openorca(i):
    return {"id": f"cot.{i}", "system_prompt": "think" if i % 2 else "", "question": f"why {i}?", "response": f"so {i}"}


def wizardlm(i):
    return {"instruction": f"do {i}", "output": f"done {i}"}


def wizardlm_v2(i):
    return {
        "idx": str(i),
        "conversations": [{"from": "human", "value": f"do {i}"}, {"from": "gpt", "value": f"done {i}"}],
    }


def metamathqa(i):
    return {
        "type": "GSM_Rephrased",
        "query": f"{i} + 1?",
        "original_question": "unused",
        "response": f"add one\nThe answer is: {i + 1}",
    }


def gsm8k(i):
    return {"question": f"What is {i} + 2?\n", "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"}


def wikitext(i):
    return {"text": ("", " = Heading = \n", f" line {i} of a page \n")[i % 3]}


def text(i):
    return {"text": f"document {i}" if i else None, "url": f"https://example.org/{i}"}


def arxiv(i):
    return {"article": f"we show {i} .\nthe proof is simple ." if i else "", "abstract": f"on {i}"}


def arc(i):
    labels = list("ABCD") if i % 2 else list("123")
    return {
        "id": f"Mercury_{i}",
        "question": f"Which is {i}?",
        "choices": {"text": [f"thing {label}" for label in labels], "label": labels},
        "answerKey": labels[i % 3],
    }


def rows(make, count, start=0):
    return [make(i) for i in range(start, start + count)]


def write(file, content):
    """Writes rows to a file of the format that its name tells."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = datasets.Dataset.from_list(content)
    if file.suffix == ".parquet":
        data.to_parquet(file)
    elif file.suffix == ".csv":
        data.to_csv(file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(json.dumps(content, indent=1))
    return file
