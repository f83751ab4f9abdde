"""Secrets do not leave in text."""

from __future__ import annotations

from pipeline.scrub import scrub, scrub_text


def test_a_uri_keeps_host_and_path_and_loses_who_asked() -> None:
    assert scrub_text("see http://a:b@h:5000/x and s3://b/k@2") == "see http://h:5000/x and s3://b/k@2"
    assert scrub({"a": [{"TOKEN": 1, "b": (1, None)}]}) == {"a": [{"b": [1, None]}]}
