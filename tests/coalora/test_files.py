"""Files: equal content gives equal bytes, in this process and in any other."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file

from coalora.files import digest, file_sha256, read_json, read_tensors, write_json, write_tensors

_WRITE = """
import sys, torch
from pathlib import Path
from coalora.files import write_tensors
for path, names in zip(sys.argv[1::2], sys.argv[2::2]):
    names = names.split(",")
    write_tensors(Path(path), {n: torch.arange(3.0) + len(n) for n in names}, {n: len(n) for n in names})
"""


def test_tensors_and_header_come_back_as_they_were(tmp_path: Path) -> None:
    tensors = {
        "view": torch.arange(12.0).view(3, 4).T,
        "codes": torch.tensor([1, 2], dtype=torch.uint8),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "array": np.arange(3),
    }
    header = {"name": "é", "nested": {"list": [1, None, "x"]}}
    write_tensors(tmp_path / "a.safetensors", tensors, header)
    back, read = read_tensors(tmp_path / "a.safetensors")
    assert read == header
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = torch.as_tensor(tensor)
        assert back[name].dtype == expected.dtype
        assert torch.equal(back[name], expected)


def test_the_bytes_are_those_of_safetensors_own_writer_and_their_digest_is_told(tmp_path: Path) -> None:
    kinds = [
        "bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2", "int16", "uint16", "float16", "bfloat16", "int32",
        "uint32", "float32", "float64", "int64", "uint64",
    ]  # fmt: skip
    if Version(version("safetensors")) < Version("0.5"):  # whose writer for torch lacks these
        kinds = [kind for kind in kinds if kind not in ("uint16", "uint32", "uint64")]
    tensors = {f"é {kind}": torch.arange(5).to(getattr(torch, kind)) for kind in kinds}
    tensors |= {"empty": torch.zeros(0, 3), "number": torch.tensor(2.0), "a": torch.ones(3, 2, dtype=torch.bool)}
    told = write_tensors(tmp_path / "ours", tensors, ["x"])
    save_file(tensors, tmp_path / "theirs", {"coalora": '["x"]'})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert told == file_sha256(tmp_path / "ours")


def test_floating_tensors_are_stored_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"w": torch.rand(3), "k": torch.arange(3)}, dtype=torch.float16)
    back, _ = read_tensors(tmp_path / "a")
    assert (back["w"].dtype, back["k"].dtype) == (torch.float16, torch.int64)


def test_tensors_that_share_memory_can_be_written(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    write_tensors(tmp_path / "a.safetensors", {"a": whole[:3], "b": whole[2:], "c": whole.requires_grad_()})
    back, header = read_tensors(tmp_path / "a.safetensors")
    assert header is None
    assert [len(back[k]) for k in "abc"] == [3, 4, 6]


def test_bytes_do_not_depend_on_insertion_order_or_on_the_process(tmp_path: Path) -> None:
    orders = {"a": "one,three,seventeen", "b": "seventeen,three,one", "c": "three,one,seventeen"}
    arguments = [x for name in "ab" for x in (str(tmp_path / name), orders[name])]
    subprocess.run([sys.executable, "-c", _WRITE, *arguments], check=True)
    names = orders["c"].split(",")
    write_tensors(tmp_path / "c", {n: torch.arange(3.0) + len(n) for n in names}, {n: len(n) for n in names})
    assert len({file_sha256(tmp_path / name) for name in orders}) == 1


def test_json_is_canonical_and_ends_with_a_newline(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": [0.1, None]})
    write_json(tmp_path / "b.json", {"a": [0.1, None], "b": 1})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.json").read_text(encoding="utf-8")
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")
    assert read_json(tmp_path / "a.json") == {"a": [0.1, None], "b": 1}


def test_json_refuses_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not (tmp_path / "a.json").exists()


def test_digests_are_sha256_of_content_not_of_order(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert file_sha256(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) == hashlib.sha256(b'{"a":1,"b":[2]}').hexdigest()
    assert digest({"a": 1}) != digest({"a": 2})
