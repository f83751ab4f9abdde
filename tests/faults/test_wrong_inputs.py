"""Wrong inputs as tables: each is refused in one message that says what is wrong, quickly, and before any work.

A new input is a line of a table. What a line may not do: end in another exception than `CoaloraError` (a traceback to a
user), pass (a wrong result without a word), or take seconds (`refusal` sets an alarm).
"""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import fields, is_dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import BaseModel

from coalora.calibrate.latency import read_latency
from coalora.calibrate.tables import CalibrationTables, calibration_tables
from coalora.cli import main
from coalora.contents import describe, problems
from coalora.data.classification import read_table
from coalora.data.text import pydoc_topics
from coalora.errors import CoaloraError
from coalora.export.base import load_adapted
from coalora.export.bundle import Bundle
from coalora.method.initial import given_set
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from pipeline.inputs.corpus import forget
from pipeline.inputs.loaders import read_set_file
from pipeline.preflight import preflight, shapes_of_model
from pipeline.settings.definitions import apply_change, load_settings, read_pipelines, validate_settings
from pipeline.settings.sections import Settings
from pipeline.sources import read_run
from tests.flows.architectures import write_model
from tests.tiny_run import TinyRun, at_home, tiny_run

TINY = Path(__file__).parents[1] / "flows" / "tiny.yaml"
SECONDS = 30  # far more than any refusal takes, on a machine that is busy


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise AssertionError(f"no answer in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def refusal(of: Callable[[], object]) -> str:
    """The message with which a call is refused."""
    with _in_time(), pytest.raises(CoaloraError) as caught:
        of()
    return checked(str(caught.value))


def checked(text: str) -> str:
    assert len(text) < 1500, len(text)
    assert text.isprintable(), text
    assert text.endswith((".", "?", "!")), text
    assert not re.search(r"Traceback|object at 0x", text), text
    return text


# ---------------------------------------------------------------------------------------------- settings, key by key
# Values that no field of a type takes.
_OF_TYPE = {
    int: ["x", "[1]", "{a: 1}", "true", "1.5", ".nan", ".inf", "-1000000000000000000000", "1" + "0" * 400, "010",
          "1:30", "2020-01-01", "''", "!!python/name:os.system x", "&a [*a]"],
    float: ["x", "[1]", "{a: 1}", "true", ".nan", "-.inf", ".inf", "-1e9", "1" + "0" * 400, "010.5e", "1:30.5", "''"],
    bool: ["2", "x", "[true]", "{a: 1}", ".nan"],
    str: ["[1]", "{a: 1}", "true", "1.5"],
    list: ["{a: 1}", "1", "true", "[[1]]", "[{a: 1}]"],
    dict: ["[1]", "1", "x", "true"],
}  # fmt: skip


def _leaves(section: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(key, type) of every setting."""
    if is_dataclass(section):
        found = {item.name: item.type for item in fields(section)}
    else:
        found = {name: field.annotation for name, field in section.model_fields.items()}
    for name, annotation in found.items():
        options = [a for a in (annotation, *get_args(annotation)) if isinstance(a, type)]
        inner = next((a for a in options if is_dataclass(a) or issubclass(a, BaseModel)), None)
        if inner is not None and _kind_of(annotation) is not list:
            yield from _leaves(inner, f"{path}{name}.")
        else:
            yield f"{path}{name}", annotation


def _kind_of(annotation: Any) -> type:
    text = str(annotation)
    words = {"list": list, "Sequence": list, "dict": dict, "Mapping": dict, "bool": bool, "float": float, "int": int}
    return next((kind for word, kind in words.items() if word in text), str)


LEAVES = dict(_leaves(Settings))


@cache
def _raw() -> dict[str, Any]:
    return read_pipelines(TINY)["tiny"]


@pytest.mark.parametrize("key", LEAVES)
def test_no_setting_takes_a_value_of_another_type(key: str) -> None:
    for value in _OF_TYPE[_kind_of(LEAVES[key])]:
        text = refusal(lambda value=value: validate_settings(apply_change(_raw(), f"{key}={value}"), "a test"))
        assert key in text or "the change" in text, (value, text)


# ------------------------------------------------------------------------------------------------- settings, by hand
# Refused by the settings alone, or by the checks before a run; several changes are joined by blanks.
SETTINGS = """
search.rounds=-1
search.rounds=1001
search.strategy=no_such
search.strategy=os:system
search.strategy=
search.candidates=0
search.delta=0
search.segments=0
search.round=2
search=5
search=[1]
search.rounds.more=1
.=1
=1
x
search..rounds=1
adapter.r=0
adapter.r=100000
adapter.lora_dropout=1
adapter.lora_dropout=-0.1
adapter.theta=some
adapter.theta=none adapter.expert_bits=0
adapter.expert_bits=9
adapter.rank_pattern={q_proj:0}
adapter.rank_pattern={q_proj:x}
adapter.rank_pattern={no_such:4}
adapter.compensation_rank=4
adapter.compensation_rank=99
training.lr=0
training.lr=-1
training.lr=1000
training.batch_size=0
training.initial_steps=0
training.initial_steps=1000000000000
training.warmup_steps=-1
training.sampling=none
training.objective.distillation=1.1
training.objective.temperature=0
training.objective.teacher=other
training.objective=5
training.max_grad_norm=0
initial_set.size=1
initial_set.size=1000000
initial_set.min_budget=0
initial_set.min_budget=1
initial_set.max_budget=9
initial_set.min_budget=3.5 initial_set.max_budget=3
initial_set.min_budget=3 initial_set.max_budget=3
initial_set.file=nowhere.json
initial_set.file=.
evaluation.budgets=[]
evaluation.budgets=[0]
evaluation.budgets=[-1]
evaluation.budgets=[1]
evaluation.budgets=[9]
evaluation.budgets=[.inf]
evaluation.budgets=[.nan]
evaluation.budgets=[3,3]
evaluation.budgets=[3,3.00000001]
evaluation.budgets=3
evaluation.budgets=[x]
evaluation.budgets=[2.5
evaluation.workers=0
evaluation.workers=65
evaluation.runner=slurm
evaluation.address=tcp://x
evaluation.shard_size=0
evaluation.harness_tasks=[no_such_task_anywhere]
evaluation.harness_include=nowhere evaluation.harness_tasks=[x]
export.formats=[]
export.formats=[packed]
export.formats=[peft,no_such]
export.adapter_dtype=int2
target_modules=[]
target_modules=q_proj
target_modules=[no_such]
target_modules=[q_proj,no_such]
target_modules=[self_attn]
target_modules=[lm_head]
target_modules=[embed_tokens]
target_modules=['*']
target_modules=[1]
choices.scheme=no_such
choices.scheme=os:system
choices.allow={bit:[2]}
choices.allow={bits:[5]}
choices.allow={bits:['2']}
choices.allow={bits:[]}
choices.allow={bits:2}
choices.allow=[2]
choices.allow={bits:[true]}
choices.also=[{scheme:int,allow:{x:[1]}}]
choices.also=[{}] choices.also=5
choices.rules=[{layers:'*.mpl.*',scheme:int}]
choices.rules=[{layers:q_proj}]
choices.rules=[{layers:'',scheme:int}]
choices.rules=[{layers:'*',min_bits:4,max_bits:3}]
choices.rules=[{layers:'*',max_bits:3},{layers:v_proj,min_bits:4}]
choices.rules=[{layers:'*',min_bits:3}]
choices.rules=[{layers:q_proj,also:[{scheme:int}]}]
choices.rules=[{layers:q_proj,allow:{x:[1]}}]
choices.rules=5
choices.allow={bits:[3],scale_bits:[8],scale_dtype:[bf16],block_size:[64],scale_block_size:[64]}
calibration.n_samples=0
calibration.n_samples=65
calibration.n_samples=1000000 benchmark.n_train=null
calibration.rounding=best
calibration.kept_mb=0
choices.allow={} calibration.kept_mb=1
benchmark.max_length=7
benchmark.max_length=256
benchmark.max_length=257
benchmark.max_length=1000000000
benchmark.n_train=0
benchmark.n_search=0
benchmark.task=translation
benchmark.task=classification
benchmark.builtin=null
benchmark.builtin=other
benchmark.builtin=pydoc-topics benchmark.files.train=x.txt
benchmark.hub.path=a/b
benchmark.builtin=null benchmark.hub.path=a/b/c
benchmark.builtin=null benchmark.hub.path=../b
benchmark.builtin=null benchmark.hub.path=''
benchmark.metric=accuracy
benchmark.metric=no_such
benchmark.metrics=[no_such]
benchmark.metrics=[]  benchmark.metric=bleu
benchmark.search_fraction=0
benchmark.search_fraction=1
benchmark.search_fraction=0.6 benchmark.validation_fraction=0.6
benchmark.search_fraction=0.999 benchmark.validation_fraction=0.0005
benchmark.split_seed=-1
benchmark.text_columns=[]
benchmark.text_columns=[a,b]
benchmark.text_columns=text
benchmark.num_labels=0
benchmark.name=null
benchmark.builtin=null benchmark.files.train=nowhere.txt
benchmark.builtin=null benchmark.files.train=.
benchmark.builtin=null benchmark.files.train=''
benchmark.builtin=null benchmark.files.train=/dev/null
model=5
model=null
model.pretrain=null
model.pretrain=null model.name_or_path=nowhere/at-all
model.pretrain=null model.name_or_path=./nowhere
model.pretrain=null model.name_or_path=a/b/c
model.pretrain=null model.name_or_path=''
model.pretrain=null model.name_or_path=.
model.pretrain=null model.name_or_path=/
model.pretrain=null model.name_or_path=/dev/null
model.pretrain=null model.name_or_path=http://h/x
model.name_or_path=x
model.pretrain.hidden_size=34 model.pretrain.num_attention_heads=4
model.pretrain.hidden_size=4
model.pretrain.hidden_size=1000000000
model.pretrain.vocab_size=100
model.pretrain.num_attention_heads=0
model.pretrain.steps=0
runtime.device=tpu
runtime.dtype=float16
runtime.master=disk
runtime.weights=zip
runtime.processes=0
runtime.processes=100000
runtime.cache_mib=-1
goal=both
cost=watts
evaluation.budgets=[120MB]
evaluation.budgets=[2.5ms]
baselines.ceiling=base baselines.methods=[shared]
goal=recover baselines.methods=[shared]
cost.kind=watts
cost.kind=latency
cost.table=x.csv
cost.kind=latency cost.table=nowhere.csv
cost.kind=latency cost.table=.
cost.kind=bytes
baselines.methods=[]
baselines.methods=[none]
baselines.methods=[shared,shared]
baselines.methods=[shared,coa]
baselines.methods=[shared,qlora]
baselines.methods=[shared,no_such]
baselines.per_budget=[shared]
tracking.tracking_uri=runs
tracking.tracking_uri=file:///tmp/x
tracking.tracking_uri=sqllite:///x.db
tracking.tracking_uri=sqlite
tracking.tracking_uri=postgres://h/x
tracking.tracking_uri=http://u:p@h
tracking.tracking_uri=https://u:p@h:5000/x
tracking.experiment=
tracking.experiment=''
tracking.registered_model='a/b'
tracking.registered_model=''
versioning.push=maybe
storage.publish=true
storage.bucket=A
storage.bucket=a_b
storage.prefix=a//b
storage.prefix=../x
storage.endpoint_url=ftp://x
storage.endpoint_url=http://u:p@h
storage.endpoint_url=h:9000
storage.attempts=0
storage.part_mib=1
storage.timeout_seconds=0
stages.retries=11
stages.timeout_hours=0
stages.timeout_hours=-1
stages.checkpoint_seconds=0
seed=-1
seed=2147483648
seed=x
no_such=1
no_such.key=1
__class__=1
""".strip().splitlines()


@pytest.fixture
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _checked_before_a_run(*changes: str) -> None:
    """What `coalora run tiny --file TINY --set CHANGES` does before it starts, with the file parsed once for all."""
    raw = _raw()
    for change in changes:
        raw = apply_change(raw, change)
    preflight(validate_settings(raw, "a test"))


@pytest.fixture(scope="module", autouse=True)
def _short_text() -> Iterator[None]:
    """The built-in text with short documents: cutting it into tokens is most of what a check takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.inputs.corpus.pydoc_topics", lambda: [text[:1500] for text in pydoc_topics()])
        forget()
        _checked_before_a_run()  # what is refused below is refused for its change
        yield
    forget()


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("line", SETTINGS)
def test_wrong_settings_are_refused_before_a_run(line: str) -> None:
    refusal(lambda: _checked_before_a_run(*line.split()))


def test_a_label_column_that_is_a_text_column_is_refused() -> None:
    changes = [
        "benchmark.task=classification", "benchmark.builtin=null", "benchmark.text_columns=[text,label]",
        "benchmark.files={train: a.csv, validation: b.csv}",
    ]  # fmt: skip
    assert "name one column twice" in refusal(lambda: _checked_before_a_run(*changes))


# -------------------------------------------------------------------------------------------------- files of pipelines
_BODY = "{model: {pretrain: {}}, benchmark: {name: x, task: language-modeling, builtin: pydoc-topics}}"
PIPELINES: dict[str, bytes | str] = {
    "empty": "",
    "comment": "# nothing",
    "scalar": "42",
    "list": "[1, 2]",
    "null": "null",
    "bytes": bytes(range(256)),
    "utf-16": "definitions: {pipelines: {}}".encode("utf-16"),
    "latin": "definitions: {pipelines: {tiny: ä}}".encode("latin-1"),
    "nul": "definitions: {pipelines: {tiny: \0}}",
    "control": f'definitions: {{pipelines: {{tiny: {{model: "a{chr(1)}b"}}}}}}',
    "tabs": "definitions:\n\tpipelines: {}",
    "unclosed": "definitions: {pipelines: {tiny: {",
    "two documents": "a: 1\n---\nb: 2",
    "no pipelines": "definitions: {}",
    "pipelines null": "definitions: {pipelines: }",
    "pipelines list": "definitions: {pipelines: [tiny]}",
    "pipeline null": "definitions: {pipelines: {tiny: }}",
    "pipeline scalar": "definitions: {pipelines: {tiny: 5}}",
    "pipeline list": "definitions: {pipelines: {tiny: []}}",
    "pipeline empty": "definitions: {pipelines: {tiny: {}}}",
    "another pipeline": f"definitions: {{pipelines: {{other: {_BODY}}}}}",
    "key twice": f"definitions: {{pipelines: {{tiny: {_BODY}}}}}\ndefinitions: {{}}",
    "pipeline twice": f"definitions: {{pipelines: {{tiny: {_BODY}, tiny: {{}}}}}}",
    "setting twice": "definitions: {pipelines: {tiny: {seed: 1, seed: 2}}}",
    "number name": f"definitions: {{pipelines: {{123: {_BODY}, tiny: {_BODY}}}}}",
    "truth name": f"definitions: {{pipelines: {{yes: {_BODY}, tiny: {_BODY}}}}}",
    "null name": f"definitions: {{pipelines: {{null: {_BODY}, tiny: {_BODY}}}}}",
    "dots": f"definitions: {{pipelines: {{../x: {_BODY}, tiny: {_BODY}}}}}",
    "newline name": f'definitions: {{pipelines: {{"tiny\\n": {_BODY}, tiny: {_BODY}}}}}',
    "slash name": f"definitions: {{pipelines: {{a/b: {_BODY}, tiny: {_BODY}}}}}",
    "long name": f"definitions: {{pipelines: {{{'a' * 65}: {_BODY}, tiny: {_BODY}}}}}",
    "list key": "definitions: {pipelines: {[1]: {}, tiny: {}}}",
    "mapping key": "definitions: {pipelines: {{a: 1}: {}, tiny: {}}}",
    "octal": "definitions: {pipelines: {tiny: {seed: 010}}}",
    "sexagesimal": "definitions: {pipelines: {tiny: {seed: 1:30}}}",
    "date": "definitions: {pipelines: {tiny: {seed: 2020-01-01}}}",
    "no date": "definitions: {pipelines: {tiny: {seed: 2020-13-45}}}",
    "huge number": f"definitions: {{pipelines: {{tiny: {{seed: {'9' * 5000}}}}}}}",
    "object": "definitions: !!python/object/apply:os.system [true]",
    "name": "definitions: {pipelines: {tiny: !!python/name:os.system }}",
    "unknown tag": "definitions: !mine {pipelines: {}}",
    "binary": "definitions: {pipelines: {tiny: {model: !!binary aGk=}}}",
    "set": "definitions: {pipelines: {tiny: !!set {a, b}}}",
    "itself": "definitions: &d {pipelines: {tiny: *d}}",
    "list of itself": "definitions: {pipelines: {tiny: {target_modules: &l [*l]}}}",
    "unknown alias": "definitions: *nobody",
    "merge of a number": "definitions: {pipelines: {tiny: {<<: 5}}}",
    "merge of itself": "definitions: {pipelines: {tiny: &t {<<: *t}}}",
    "deep list": "definitions: {pipelines: {tiny: " + "[" * 5000 + "]" * 5000 + "}}",
    "deep mapping": "definitions: {pipelines: {tiny: " + "{a: " * 3000 + "1" + "}" * 3000 + "}}",
    "bomb": "\n".join(
        [
            'a0: &a0 ["x","x","x","x","x","x","x","x","x"]',
            *(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)),
            "definitions: {pipelines: {tiny: {target_modules: *a11}}}",
        ]
    ),
    "long values": f"definitions: {{pipelines: {{tiny: {{model: {'x' * 100_000}}}}}}}",
    "many wrong keys": "definitions: {pipelines: {tiny: {" + ", ".join(f"k{i}: 1" for i in range(5000)) + "}}}",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_wrong_files_of_pipelines_are_refused(tmp_path: Path, name: str) -> None:
    given, file = PIPELINES[name], tmp_path / "pipelines.yaml"
    file.write_bytes(given if isinstance(given, bytes) else given.encode())
    refusal(lambda: load_settings("tiny", file=file))


# ------------------------------------------------------------------------------------------------ tables of examples
# Name (its ending tells the format) -> content; columns text and label are asked for.
TABLES: dict[str, bytes | str] = {
    "empty.csv": "",
    "header.csv": "text,label\n",
    "blank.csv": "\n\n\n",
    "bytes.csv": bytes(range(256)) * 4,
    "utf-16.csv": "text,label\na,0\n".encode("utf-16"),
    "latin.csv": "text,label\nä,0\n".encode("latin-1"),
    "nul.csv": "text,label\na\0b,0\nc,1\n",
    "wider.csv": "text,label\nhello, world,0\nb,1\n",
    "all wider.csv": "text,label\nhello,1,0\nb,1,1\n",
    "narrower.csv": "text,label\na,0\nb\n",
    "other columns.csv": "sentence,label\na,0\n",
    "no label.csv": "text\na\n",
    "semicolons.csv": "text;label\na;0\n",
    "twice.csv": "text,text,label\na,b,0\n",
    "label twice.csv": "text,label,label\na,0,1\n",
    "no text.csv": "text,label\n,0\nb,1\n",
    "blank text.csv": 'text,label\n"  ",0\nb,1\n',
    "no class.csv": "text,label\na,\nb,1\n",
    "words.csv": "text,label\na,positive\nb,negative\n",
    "negative.csv": "text,label\na,-1\nb,-1\n",
    "nan.csv": "text,label\na,nan\nb,1\n",
    "inf.csv": "text,label\na,inf\nb,1\n",
    "half.csv": "text,label\na,0.5\nb,1\n",
    "hex.csv": "text,label\na,0x1\nb,1\n",
    "underscore.csv": "text,label\na,1_0\nb,1\n",
    "yes.csv": "text,label\na,yes\nb,no\n",
    "unclosed.csv": 'text,label\n"a,0\nb,1\n',
    "after quote.csv": 'text,label\n"a"b,0\nb,1\n',
    "tabs.tsv": "text\tlabel\na\tb\t0\nc\t1\n",
    "commas.tsv": "text,label\na,0\n",
    "bytes.tsv": bytes(range(256)) * 4,
    "empty.jsonl": "",
    "array.jsonl": "[1, 2]\n",
    "scalar.jsonl": "5\n",
    "null.jsonl": "null\n",
    "whole array.jsonl": '[{"text": "a", "label": 0}]\n',
    "pretty.jsonl": '{\n"text": "a",\n"label": 0\n}\n',
    "broken.jsonl": '{"text": "a", "label": 0}\n{"text": "b"\n',
    "two a line.jsonl": '{"text": "a", "label": 0} {"text": "b", "label": 1}\n',
    "missing.jsonl": '{"text": "a", "label": 0}\n{"text": "b"}\n',
    "other.jsonl": '{"txt": "a", "label": 0}\n',
    "key twice.jsonl": '{"text": "a", "label": 0, "label": 1}\n',
    "object.jsonl": '{"text": {"a": 1}, "label": 0}\n',
    "list.jsonl": '{"text": ["a"], "label": 0}\n',
    "number.jsonl": '{"text": 5, "label": 0}\n',
    "truth.jsonl": '{"text": true, "label": 0}\n',
    "null text.jsonl": '{"text": null, "label": 0}\n',
    "null label.jsonl": '{"text": "a", "label": null}\n',
    "nan.jsonl": '{"text": "a", "label": NaN}\n',
    "infinity.jsonl": '{"text": "a", "label": Infinity}\n',
    "list label.jsonl": '{"text": "a", "label": [1]}\n',
    "object label.jsonl": '{"text": "a", "label": {"x": 1}}\n',
    "huge label.jsonl": '{"text": "a", "label": 1' + "0" * 400 + "}\n",
    "huger label.jsonl": '{"text": "a", "label": 1' + "0" * 5000 + "}\n",
    "deep.jsonl": '{"text": ' + "[" * 100_000 + "\n",
    "bytes.jsonl": bytes(range(256)),
    "latin.jsonl": '{"text": "ä", "label": 0}\n'.encode("latin-1"),
    "bytes.parquet": bytes(range(256)) * 4,
    "empty.parquet": "",
    "magic.parquet": b"PAR1" + bytes(64) + b"PAR1",
    "csv.parquet": "text,label\na,0\n",
    "a.xlsx": b"PK",
    "a.txt": "a 0\n",
    "a.json": '[{"text": "a", "label": 0}]',
    "a": "text,label\na,0\n",
    "a.csv.gz": b"\x1f\x8b",
}


@pytest.mark.parametrize("name", TABLES)
def test_wrong_tables_are_refused_with_their_file(tmp_path: Path, name: str) -> None:
    given, file = TABLES[name], tmp_path / name
    file.write_bytes(given if isinstance(given, bytes) else given.encode())
    assert name in refusal(lambda: read_table(file, ["text"], "label"))


def _column(values: list[Any], kind: Any) -> dict[str, Any]:
    import pyarrow as pa

    return {"text": pa.array(values, kind), "label": pa.array([0] * len(values), pa.int64())}


PARQUET: dict[str, Callable[[Any], dict[str, Any]]] = {
    "lists": lambda pa: _column([["a"], ["b"]], pa.list_(pa.string())),
    "bytes": lambda pa: _column([b"a", b"b"], pa.binary()),
    "numbers": lambda pa: _column([1, 2], pa.int64()),
    "truth": lambda pa: _column([True, False], pa.bool_()),
    "dates": lambda pa: _column([0, 1], pa.timestamp("s")),
    "structs": lambda pa: _column([{"a": 1}], pa.struct([("a", pa.int64())])),
    "nulls": lambda pa: _column([None, "b"], pa.string()),
    "no rows": lambda pa: _column([], pa.string()),
    "no label": lambda pa: {"text": pa.array(["a"])},
    "text labels": lambda pa: {"text": pa.array(["a"]), "label": pa.array(["yes"])},
    "list labels": lambda pa: {"text": pa.array(["a"]), "label": pa.array([[1]])},
    "null labels": lambda pa: {"text": pa.array(["a"]), "label": pa.array([None], pa.int64())},
}


@pytest.mark.parametrize("name", PARQUET)
def test_wrong_columns_of_parquet_are_refused(tmp_path: Path, name: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(PARQUET[name](pa)), tmp_path / "a.parquet")
    assert "a.parquet" in refusal(lambda: read_table(tmp_path / "a.parquet", ["text"], "label"))


def test_a_parquet_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(_column(["a", "b"], pa.string())), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for end in range(0, len(whole), 37):
        (tmp_path / "a.parquet").write_bytes(whole[:end])
        refusal(lambda: read_table(tmp_path / "a.parquet", ["text"], "label"))


# ---------------------------------------------------------------------------------------------------- latency tables
LATENCIES: dict[str, bytes | str] = {
    "empty": "",
    "header": "layer,choice,microseconds\n",
    "no header": "*,*,5\n",
    "other header": "name,choice,microseconds\n*,*,5\n",
    "column twice": "layer,layer,choice,microseconds\n*,*,*,5\n",
    "microseconds twice": "layer,choice,microseconds,microseconds\n*,*,5,5\n",
    "choice and fields": "layer,choice,bits,microseconds\n*,*,2,5\n",
    "no choice": "layer,microseconds\n*,5\n",
    "unknown field": "layer,bit,microseconds\n*,2,5\n",
    "narrow": "layer,choice,microseconds\n*,*\n",
    "wide": "layer,choice,microseconds\n*,*,5,5\n",
    "text": "layer,choice,microseconds\n*,*,fast\n",
    "nothing": "layer,choice,microseconds\n*,*,\n",
    "negative": "layer,choice,microseconds\n*,*,-1\n",
    "nan": "layer,choice,microseconds\n*,*,nan\n",
    "inf": "layer,choice,microseconds\n*,*,inf\n",
    "huge": "layer,choice,microseconds\n*,*,1e308\n",
    "underscore": "layer,choice,microseconds\n*,*,1_0\n",
    "comma": "layer,choice,microseconds\n*,*,1,5\n",
    "given twice": "layer,choice,microseconds\n*,*,5\n*,*,6\n",
    "overlap": "layer,choice,microseconds\n*,*,5\nq_proj,*,6\n",
    "gap": "layer,choice,microseconds\nq_proj,*,5\n",
    "no layer": "layer,choice,microseconds\nx,*,5\n",
    "no such choice": "layer,choice,microseconds\n*,nf9,5\n",
    "quote": 'layer,choice,microseconds\n"*,*,5\n',
    "bytes": bytes(range(256)),
    "utf-16": "layer,choice,microseconds\n*,*,5\n".encode("utf-16"),
}


@cache
def _tables() -> CalibrationTables:
    layers = find_target_layers(shapes_of_model(load_settings("tiny", file=TINY)))
    space = ChoiceSpace("nf", bits=[2, 3], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
    return calibration_tables(layers, space, np.ones((len(layers), len(space))), "0" * 64)


@pytest.mark.parametrize("name", LATENCIES)
def test_wrong_latency_tables_are_refused(tmp_path: Path, name: str) -> None:
    given, file, tables = LATENCIES[name], tmp_path / "latency.csv", _tables()
    file.write_bytes(given if isinstance(given, bytes) else given.encode())
    assert "latency.csv" in refusal(lambda: read_latency(file, tables.layers, tables.space, tables.allowed))


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("row", ["*,*,0", "*,*,5"])
def test_latencies_that_leave_nothing_to_choose_are_refused(row: str) -> None:
    Path("latency.csv").write_text(f"layer,choice,microseconds\n{row}\n")
    settings = load_settings("tiny", file=TINY, changes=["cost.kind=latency", "cost.table=latency.csv"])
    assert "nothing to choose" in refusal(lambda: preflight(settings))


# ------------------------------------------------------------------------------------------------- configuration sets
# Changes of a good set: a path into it, and what stands there then.
_HUGE = 10**30
SETS: dict[str, Any] = {
    "list": [],
    "string": "x",
    "number": 5,
    "null": None,
    "empty": {},
    "format": ("format", "coalora-configurations/0"),
    "format list": ("format", [1]),
    "format null": ("format", None),
    "scheme": ("scheme", "int"),
    "scheme list": ("scheme", ["nf"]),
    "scheme object": ("scheme", {"a": 1}),
    "layers": ("layers", ["x"]),
    "layers null": ("layers", None),
    "layers number": ("layers", 5),
    "choices string": ("choices", "abc"),
    "choices null": ("choices", None),
    "choices empty": ("choices", []),
    "choices numbers": ("choices", [1, 2]),
    "choices nested": ("choices", [[{}]]),
    "choices lists": ("choices", [{"bits": [2]}]),
    "choices unknown": ("choices", [{"bits": 2}]),
    "members null": ("members", None),
    "members number": ("members", 5),
    "members string": ("members", "abc"),
    "members empty": ("members", []),
    "members one": ("members", [{"average_bits": 2, "loss": None, "round": 0, "choices": [0] * 14}]),
    "members numbers": ("members", [1, 2]),
    "members null each": ("members", [None, None]),
    "members objects": ("members", [{}, {}]),
    "member choices null": ("members", [{"loss": None, "round": 0, "choices": None}] * 2),
    "member choices text": ("members", [{"loss": None, "round": 0, "choices": "0" * 14}] * 2),
    "member choices floats": ("members", [{"loss": None, "round": 0, "choices": [0.5] * 14}] * 2),
    "member choices beyond": ("members", [{"loss": None, "round": 0, "choices": [99] * 14}] * 2),
    "member choices negative": ("members", [{"loss": None, "round": 0, "choices": [-1] * 14}] * 2),
    "member choices huge": ("members", [{"loss": None, "round": 0, "choices": [_HUGE] * 14}] * 2),
    "member choices few": ("members", [{"loss": None, "round": 0, "choices": [0] * 13}] * 2),
    "member choices many": ("members", [{"loss": None, "round": 0, "choices": [0] * 15}] * 2),
    "member choices nested": ("members", [{"loss": None, "round": 0, "choices": [[0]] * 14}] * 2),
    "member loss text": ("members", [{"loss": "x", "round": 0, "choices": [0] * 14}] * 2),
    "member round text": ("members", [{"loss": None, "round": "x", "choices": [0] * 14}] * 2),
    "member round huge": ("members", [{"loss": None, "round": _HUGE, "choices": [0] * 14}] * 2),
}
NO_JSON: dict[str, bytes | str] = {
    "empty": "",
    "blank": " \n",
    "bytes": bytes(range(256)),
    "utf-16": "{}".encode("utf-16"),
    "cut": '{"format": "coalora-conf',
    "two values": "{} {}",
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 100_000,
    "huge number": "9" * 5000,
    "comment": "{} // x",
    "nul": "\0",
}


@pytest.mark.parametrize("name", SETS)
def test_wrong_configuration_sets_are_refused(tmp_path: Path, name: str) -> None:
    tables = _tables()
    good = {
        "format": "coalora-configurations/1",
        "scheme": "nf",
        "base_digest": "0" * 64,
        "layers": [layer.name for layer in tables.layers],
        "choices": [tables.space.choice_dict(k) for k in range(2)],
        "members": [{"average_bits": 2, "loss": None, "round": 0, "choices": [k] * 14} for k in range(2)],
    }
    assert len(given_set(good, tables)) == 2
    change = SETS[name]
    (tmp_path / "set.json").write_text(json.dumps(good | dict([change]) if isinstance(change, tuple) else change))
    refusal(lambda: given_set(read_set_file(tmp_path / "set.json"), tables))


@pytest.mark.parametrize("name", NO_JSON)
def test_a_file_that_is_no_json_is_refused_by_name(tmp_path: Path, name: str) -> None:
    given, file = NO_JSON[name], tmp_path / "run.json"
    file.write_bytes(given if isinstance(given, bytes) else given.encode())
    for read in (read_set_file, lambda path: read_run(path.parent), lambda path: describe(path.parent / "run.json")):
        assert str(tmp_path) in refusal(lambda read=read: read(file))


# -------------------------------------------------------------------------------------------------------- base models
_LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 128,
}  # fmt: skip
_LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
# Fields of config.json, or a file and its content.
MODELS: dict[str, dict[str, Any] | tuple[str, str | bytes | None]] = {
    "no architecture": {"model_type": "martian"},
    "no text": {"model_type": "vit"},
    "architecture number": {"model_type": 5},
    "sees what it predicts": {"model_type": "xlm-roberta", "pad_token_id": 1},
    "electra": {"model_type": "electra", "embedding_size": 32},
    "bnb": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "gptq": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "awq": {"quantization_config": {"quant_method": "awq", "bits": 4}},
    "fp8": {"quantization_config": {"quant_method": "fp8"}},
    "unknown method": {"quantization_config": {"quant_method": "mine"}},
    "method of nothing": {"quantization_config": {"bits": 4}},
    "heads": {"num_attention_heads": 3},
    "no heads": {"num_attention_heads": 0},
    "negative size": {"hidden_size": -32},
    "text size": {"hidden_size": "wide"},
    "null size": {"hidden_size": None},
    "no blocks": {"num_hidden_layers": 0},
    "few tokens": {"vocab_size": 10},
    "padding outside": {"pad_token_id": 5000},
    "few positions": {"max_position_embeddings": 16},
    "activation": {"hidden_act": "no_such"},
    "flash attention": {"attn_implementation": "flash_attention_2"},
    "flash attention, inner": {"_attn_implementation": "flash_attention_3"},
    "no attention": {"attn_implementation": "mine"},
    "code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}},
    "config empty": ("config.json", ""),
    "config list": ("config.json", "[]"),
    "config scalar": ("config.json", "5"),
    "config null": ("config.json", "null"),
    "config bytes": ("config.json", bytes(range(256))),
    "config deep": ("config.json", "[" * 100_000),
    "config pointer": ("config.json", _LFS),
    "no config": ("config.json", None),
    "no weights": ("model.safetensors", None),
    "weights empty": ("model.safetensors", ""),
    "weights pointer": ("model.safetensors", _LFS),
    "weights bytes": ("model.safetensors", bytes(range(256))),
    "weights header": ("model.safetensors", b"\xff" * 8 + b"{}"),
    "weights cut": ("model.safetensors", (40).to_bytes(8, "little") + b'{"a":{"dtype":"F32"'),
    "no tokenizer": ("tokenizer.json", None),
    "tokenizer empty": ("tokenizer.json", ""),
    "tokenizer object": ("tokenizer.json", "{}"),
    "tokenizer list": ("tokenizer.json", "[]"),
    "tokenizer null": ("tokenizer.json", "null"),
    "tokenizer pointer": ("tokenizer.json", _LFS),
    "tokenizer bytes": ("tokenizer.json", bytes(range(256))),
    "tokenizer config list": ("tokenizer_config.json", "[]"),
    "tokenizer config cut": ("tokenizer_config.json", '{"pad_'),
}


@pytest.mark.usefixtures("_nowhere")
@pytest.mark.parametrize("name", MODELS)
def test_wrong_base_models_are_refused_before_a_run(name: str) -> None:
    change = MODELS[name]
    folder = write_model(Path("base"), _LLAMA | (change if isinstance(change, dict) else {}))
    if isinstance(change, tuple):
        file, content = folder / change[0], change[1]
        file.unlink()
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    refusal(lambda: _checked_before_a_run("model.pretrain=null", "model.name_or_path=base"))


# ------------------------------------------------------------------------------------------- what a run leaves behind
@pytest.fixture(scope="module")
def run() -> Iterator[TinyRun]:
    made = tiny_run()
    with at_home(made.home):
        yield made


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "missing": lambda content: None,
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "bytes less": lambda content: content[:-3],
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"not what it was",
    "list": lambda content: b"[]",
    "object": lambda content: b"{}",
    "null": lambda content: b"null",
    "pointer": lambda content: _LFS.encode(),
}
PARTS = {
    "bundle": (
        ["bundle.json", "adapter.safetensors", "tables.safetensors", "configurations.json"],
        lambda folder: Bundle.load(folder / "bundle").adapt(3.0),
    ),
    "export/2.5-bits": (
        [
            "base/config.json", "base/configuration.json", "base/quantized.safetensors", "base/rest.safetensors",
            "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/coalora.json",
        ],
        lambda folder: load_adapted(folder / "export/2.5-bits/base", folder / "export/2.5-bits/adapter"),
    ),
    ".": (["run.json"], read_run),
}  # fmt: skip
DAMAGED = [(part, file, damage) for part, (files, _) in PARTS.items() for file in files for damage in DAMAGES]


@pytest.mark.parametrize(("part", "file", "damage"), DAMAGED, ids=lambda value: value)
def test_damaged_files_are_named(run: TinyRun, tmp_path: Path, part: str, file: str, damage: str) -> None:
    # The last part is a file beside the others.
    ignored = shutil.ignore_patterns("export", "bundle", "report") if part == "." else None
    shutil.copytree(run.folder / part, tmp_path / "run" / part, ignore=ignored)
    damaged = tmp_path / "run" / part / file
    content = DAMAGES[damage](damaged.read_bytes())
    damaged.unlink()
    if content is not None:
        damaged.write_bytes(content)
    assert str(tmp_path / "run" / part) in refusal(lambda: PARTS[part][1](tmp_path / "run"))
    with _in_time(), suppress(CoaloraError):  # verify says so as well, and never ends otherwise
        assert problems(tmp_path / "run" / part)[1]


RECORDS: dict[str, tuple[str, Any]] = {
    **{f"{key} {value!r}": (key, value) for key in ("settings", "base", "benchmark", "tables", "bundle")
       for value in (None, 5, "x", [], {}, {"kind": 5})},
    "digest": ("base", {"kind": "base", "digest": "../x", "nbytes": 1, "meta": {}}),
    "size": ("base", {"kind": "base", "digest": "0" * 64, "nbytes": 10**400, "meta": {}}),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_a_run_with_other_types_is_refused(run: TinyRun, tmp_path: Path, name: str) -> None:
    record = json.loads((run.folder / "run.json").read_text()) | dict([RECORDS[name]])
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert "run.json" in refusal(lambda: read_run(tmp_path))


# ------------------------------------------------------------------------------------------------------------ commands
# Words of a command line; RUN, HOME, TEXT, HERE and SET stand for a run folder, its store, a text, a folder and a file.
COMMANDS = """
adapt RUN --out HERE/a
adapt RUN --bits 3 --size 1MB --out HERE/a
adapt RUN --bits 3 --table TEXT --out HERE/a
adapt RUN --size 1 --out HERE/a
adapt RUN --size 1B --out HERE/a
adapt RUN --size 1PB --out HERE/a
adapt RUN --size 3ms --out HERE/a
adapt RUN --size '' --out HERE/a
adapt RUN --latency 3ms --out HERE/a
adapt RUN --latency 3ms --table TEXT --out HERE/a
adapt RUN --latency 3ms --table HERE/none --out HERE/a
adapt RUN --configuration HERE/none --out HERE/a
adapt RUN --configuration TEXT --out HERE/a
adapt RUN --configuration RUN/run.json --out HERE/a
adapt RUN --bits 3 --to none --out HERE/a
adapt RUN --bits 3 --to peft os:system --out HERE/a
adapt RUN --bits 3 --model HERE/none --out HERE/a
adapt RUN --bits 3 --model HERE --out HERE/a
adapt RUN --bits 3 --evaluate HERE/none --out HERE/a
adapt RUN --bits 3 --evaluate HERE --out HERE/a
adapt s3://none --bits 3 --out HERE/a
adapt s3://bucket/../runs/a/b --bits 3 --out HERE/a
adapt models:/none --bits 3 --out HERE/a
adapt gs://bucket/runs/a/b --bits 3 --out HERE/a
compare RUN TEXT
compare RUN HERE/none
compare RUN RUN/bundle
push RUN me/name
push HERE/none me/name
adapt RUN --bits 1 --out HERE/a
adapt RUN --bits 9 --out HERE/a
adapt RUN --bits 100 --out HERE/a
adapt RUN --bits inf --out HERE/a
adapt RUN --bits nan --out HERE/a
adapt RUN --bits -1 --out HERE/a
adapt RUN --bits x --out HERE/a
adapt RUN --bits  --out HERE/a
adapt RUN --bits 3
adapt RUN --bits 3 --out
adapt RUN --bits 3 --out ''
adapt RUN --bits 3 --out HOME
adapt RUN --bits 3 --out HOME/a
adapt RUN --bits 3 --out HOME/artifacts/a
adapt RUN --bits 3 --out TEXT
adapt RUN --bits 3 --out TEXT/a
adapt RUN --bits 9 --out HERE/a --to peft
adapt RUN --bits 3 --out HOME/a --to peft
adapt HERE/none --bits 3 --out HERE/a
adapt HERE --bits 3 --out HERE/a
adapt TEXT --bits 3 --out HERE/a
adapt '' --bits 3 --out HERE/a
inspect HERE/none
inspect HERE
inspect TEXT
inspect ''
verify HERE/none
verify HERE
score RUN --text TEXT --budget 9
score RUN --text TEXT --budget 1
score RUN --text TEXT --budget inf
score RUN --text TEXT --budget nan
score RUN --text TEXT --budget 3 --max-length 0
score RUN --text TEXT --budget 3 --max-length 1
score RUN --text TEXT --budget 3 --max-length -5
score RUN --text TEXT --budget 3 --max-length 100000
score RUN --text TEXT --budget 3 --stride 0
score RUN --text TEXT --budget 3 --stride -1
score RUN --text TEXT --budget 3 --stride 1000
score RUN --text TEXT --budget 3 --max-length 8 --stride 8
score RUN --text TEXT --budget 3 --json HERE/none/a.json
score RUN --text TEXT --budget 3 --json HERE
score RUN --text TEXT --budget 3 --json HOME/a.json
score RUN --text TEXT --budget 3 --json ''
score RUN --text HERE/none --budget 3
score RUN --text HERE --budget 3
score RUN --budget 3
score HERE --text TEXT --budget 3
prune --older-than nan
prune --older-than -1
prune --older-than inf
prune --older-than 1e9
prune --older-than x
prune --root HERE/none
prune --root TEXT
prune --root ''
prune --tracking-uri sqlite:///HERE/none.db
prune --tracking-uri sqlite:///TEXT
prune --tracking-uri ''
prune --withdraw a/b
prune --at s3
prune --at s3://A_B/x
restore --out HERE/a --rev ''
restore --out HERE/a --rev=
restore --out HERE/a --mlflow-run ''
restore --out HERE/a --mlflow-run x --rev y
restore --out HERE/a --mlflow-run x --tracking-uri sqlite:///HERE/none.db
restore --out HERE/a --mlflow-run x --tracking-uri sqlite:///TEXT
restore --out HERE/a --mlflow-run x --tracking-uri sqlite:HERE/none.db
restore --out HERE/a --round x
restore --out HOME/a
restore --out HERE
restore --out TEXT/a
restore
download s3://b --out HERE/a
download s3://b/p/runs/x --out HERE/a
download http://b/p/runs/x/y --out HERE/a
download s3://b/p/runs/x/y --out HOME/a
download s3://b/p/runs/x/y
upload RUN
upload RUN --to s3://
upload RUN --to b
upload RUN --to s3://b --endpoint-url ftp://x
upload RUN --to s3://b --endpoint-url http://u:p@h
upload HERE --to s3://b/p
run
run no_such
run tiny --file HERE/none.yaml
run tiny --file HERE
run tiny --file TEXT
run tiny --file TINY --set
run tiny --file TINY --set x
run tiny --file TINY --set a=b
run tiny --file TINY --set search.rounds=x
run tiny --file TINY --set search.rounds=010
run tiny --file TINY --refresh no_such
run tiny --file TINY --set versioning.enabled=false tracking.tracking_uri=sqlite:///HERE/none.db
run ../tiny --file TINY
stage no_such tiny --file TINY
stage calibration no_such --file TINY
stack up --ports s3=5000 mlflow=5000
stack up --ports s3=4200
stack up --ports s3=70000
stack up --ports no=1
stack up --ports s3
stack up --wait nan
stack up --wait -1
limits
limits --gpus x
limits --gpus -1
no_such
--no-such
""".strip().splitlines()


@pytest.mark.parametrize("line", COMMANDS)
def test_wrong_commands_end_with_two_and_a_message(
    run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("some words of a text that is scored " * 20)
    places = {"RUN": run.folder, "HOME": run.home, "HERE": tmp_path, "TEXT": tmp_path / "text.txt", "TINY": TINY}
    monkeypatch.setattr("infra.stack.Stack._ensure", None)  # which would start servers

    def found() -> list[Path]:
        return [p for place in (tmp_path, run.home) for p in sorted(place.rglob("*")) if "stack" not in p.parts]

    before = found()
    words = [re.sub(r"RUN|HOME|HERE|TEXT|TINY", lambda m: str(places[m[0]]), w).replace("''", "") for w in line.split()]
    with redirect_stderr(StringIO()) as told, _in_time():
        assert main(words) == 2
    text = told.getvalue().strip()
    assert text.startswith("error: "), text
    checked(text.splitlines()[-1])
    assert "Traceback" not in text
    assert found() == before


# ------------------------------------------------------------------------------------------------------- random damage
@pytest.mark.parametrize("seed", range(3))
def test_a_file_with_bytes_changed_at_random_is_read_or_refused(run: TinyRun, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder = shutil.copytree(run.folder / "bundle", tmp_path / "bundle")
    for name in PARTS["bundle"][0]:
        whole = (folder / name).read_bytes()
        for _ in range(20):
            changed = bytearray(whole)
            for _ in range(draw.choice([1, 1, 2, 8])):
                changed[draw.randrange(min(len(whole), 4000))] = draw.randrange(256)
            (folder / name).write_bytes(changed)
            with _in_time(), suppress(CoaloraError):
                Bundle.load(folder).adapt(3.0)
        (folder / name).write_bytes(whole)
