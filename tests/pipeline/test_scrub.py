"""Secrets do not leave in text."""

from __future__ import annotations

import pytest

from pipeline.scrub import has_login, scrub, scrub_text


def test_a_uri_keeps_host_and_path_and_loses_who_asked() -> None:
    assert scrub_text("see http://a:b@h:5000/x and s3://b/k@2") == "see http://h:5000/x and s3://b/k@2"
    assert scrub({"a": [{"TOKEN": 1, "b": (1, None)}]}) == {"a": [{"b": [1, None]}]}


@pytest.mark.parametrize(
    "text",
    [
        "http://user:SECRET@host/x",
        "http://user:SEC/RET@host/x",
        "http://user:SEC RET@host/x",
        "http://user:S@E/C@host/x",
        "http://user:5000SECRET@host/x",
        "http://SECRET@host/x",
        "postgresql+asyncpg://user:p#SECRET?@host/db",
        "https://host/x?token=SECRET",
        "https://host/x?a=1&X-Amz-Signature=SECRET#top",
        "https://host/x#access_token=SECRET&b=1",
        "https://host/x?a=1;password=SECRET",
        "Authorization: Bearer SECRET.SEC-RET_/+==",
        "authorization: basic SECRET=",
        "the header 'Bearer SECRET' was refused",
    ],
)
def test_secrets_are_taken_out_wherever_they_stand(text: str) -> None:
    found = scrub_text(text)
    assert "SEC" not in found
    assert "RET" not in found
    assert "S@E" not in found
    assert ("host" in found) == ("host" in text)


@pytest.mark.parametrize(
    "text",
    [
        "http://host:5000/a@b",
        "see http://h:5000, or mail a@b",
        "sqlite:////a@b/mlflow.db",
        "bearer of news",
        "10:30@x",
    ],
)
def test_other_text_stays_as_it_is(text: str) -> None:
    assert scrub_text(text) == text


@pytest.mark.parametrize(
    ("uri", "login"),
    [("http://u:p@h:5000", True), ("http://u@h", True), ("postgresql://u:p/w@h/d", True), ("http://h:5000", False),
     ("sqlite:////a@b/mlflow.db", False), ("http://h:5000/a@b", False)],
)  # fmt: skip
def test_an_address_with_a_login_is_known(uri: str, login: bool) -> None:
    assert has_login(uri) is login
