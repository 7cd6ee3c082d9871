"""Tasks of lm-eval on a model, by a task file of one's own; nothing is downloaded."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import make_model

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

ROOT = Path(__file__).parents[2]
TASK = """
task: continue
dataset_path: json
dataset_kwargs:
  data_files: {files}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""
QUESTIONS = [
    {"question": "a function", "choices": ["returns a value", "zzzz qqqq"], "answer": 0},
    {"question": "the module", "choices": ["xxqq zzkk", "provides a class"], "answer": 1},
    {"question": "this method", "choices": ["is called", "kkzz xxqq"], "answer": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose tokenizer is the bundled one, and a folder with a task."""
    folder = tmp_path_factory.mktemp("zero_shot")
    make_model("llama", folder / "model", vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources/pydoc-llama" / name, folder / "model" / name)
    (folder / "tasks").mkdir()
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "tasks/continue.yaml").write_text(TASK.format(files=folder / "questions.jsonl"))
    return folder


def zero_shot(folder, *arguments):
    script = ROOT / "workflow/scripts/zero_shot.py"
    command = [sys.executable, script, "--model", folder / "model", "--step", "iter0", "--device", "cpu", *arguments]
    command += ["--task-folder", folder / "tasks", "--output", folder / "zero_shot.json"]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True)


def test_a_task_of_ones_own_is_measured_as_it_should_be(folder):
    finished = zero_shot(folder, "--tasks", "continue")
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads((folder / "zero_shot.json").read_text())
    assert found["step"] == "iter0" and found["protocol"].startswith("lm-eval 0.")
    assert found["tasks"] == {"continue": {"acc": pytest.approx(accuracy(folder / "model"))}}


def accuracy(model_folder):
    """The share of questions whose right answer is the likelier continuation, a space before it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)

    def likelihood(question, choice):
        before = len(tokenizer(question)["input_ids"])
        tokens = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        with torch.no_grad():
            logits = model(tokens).logits[0, before - 1 : -1].log_softmax(-1)
        return logits.gather(1, tokens[0, before:, None]).sum().item()

    right = 0
    for asked in QUESTIONS:
        likelihoods = [likelihood(asked["question"], choice) for choice in asked["choices"]]
        right += likelihoods.index(max(likelihoods)) == asked["answer"]
    return right / len(QUESTIONS)


def test_an_unknown_task_is_one_line(folder):
    finished = zero_shot(folder, "--tasks", "continu")
    assert finished.returncode == 1
    assert "zero-shot task 'continu': unknown to lm-eval" in finished.stderr and "Traceback" not in finished.stderr
