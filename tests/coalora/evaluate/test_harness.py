"""Harness tasks run on an adapted model as on any other, and their absence is told before anything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.evaluate.harness import _manager, check_tasks, harness_version, run_harness

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'coalora[eval]'")
QUESTIONS = [("the quick brown", 0), ("a small model", 1), ("the lazy", 1), ("what the large", 0), ("tokens, bytes", 1)]
CHOICES = ["fox jumps", "reads"]


@pytest.fixture
def own_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task of five questions with two answers each."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [json.dumps({"question": q, "label": label}) for q, label in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "two_ways.yaml").write_text(
        f"""
task: two_ways
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: {json.dumps(CHOICES)}
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""
    )
    return folder


@needs_harness
def test_accuracy_of_a_configuration_is_that_of_its_most_likely_answers(
    tiny_llama: Callable, tiny_tokenizer, make_adapted: Callable, own_tasks: Path
) -> None:
    adapted = make_adapted(tiny_llama(), perturb=0.1)
    found = []
    for configuration in (np.zeros(14, dtype=np.int64), np.full(14, 7)):
        adapted.switch(configuration)
        adapted.peft_model.eval()
        right = []
        for question, label in QUESTIONS:
            likelihoods = []
            for choice in CHOICES:
                context = tiny_tokenizer(question, add_special_tokens=False)["input_ids"]
                whole = tiny_tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    p = adapted.peft_model(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
                likelihoods.append(sum(float(p[i - 1, whole[i]]) for i in range(len(context), len(whole))))
            right.append(int(np.argmax(likelihoods)) == label)
        result = run_harness(adapted.peft_model, tiny_tokenizer, ["two_ways"], include=own_tasks, batch_size=2)
        assert result["two_ways"]["acc,none"] == pytest.approx(np.mean(right))
        assert all(np.isfinite(value) for value in result["two_ways"].values())
        found.append(result)
    first = run_harness(adapted.peft_model, tiny_tokenizer, ["two_ways"], include=own_tasks, limit=1)
    assert first["two_ways"]["acc,none"] in (0.0, 1.0)
    adapted.switch(np.zeros(14, dtype=np.int64))
    again = run_harness(adapted.peft_model, tiny_tokenizer, ["two_ways"], include=own_tasks, batch_size=2)
    assert again == found[0]


@needs_harness
def test_an_unknown_task_is_refused_with_those_that_are_meant(own_tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_tasks(["two_ways"], own_tasks)
    # The harness's own thousands take half a minute to read.
    monkeypatch.setattr("coalora.evaluate.harness._manager_of", lambda *_: _manager(str(own_tasks), defaults=False))
    with pytest.raises(CoaloraError, match=r"no task 'two_wais' \(two_ways\)"):
        check_tasks(["two_wais"], own_tasks)
    with pytest.raises(CoaloraError, match=r"no folder .*none of harness tasks"):
        check_tasks(["hellaswag"], own_tasks / "none")


def test_without_the_extra_the_remedy_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("coalora.evaluate.harness.version", missing)
    for call in (harness_version, lambda: check_tasks(["hellaswag"]), lambda: run_harness(None, None, ["hellaswag"])):
        with pytest.raises(CoaloraError, match=r"pip install 'coalora\[eval\]'"):
            call()
