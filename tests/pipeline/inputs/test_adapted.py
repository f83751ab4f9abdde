"""A thread keeps one model between stages, and no load happens while anything is measured."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.inputs.adapted import LoadGuard, hold, release_models


class Model:
    pass


@pytest.fixture(autouse=True)
def nothing_held() -> Iterator[None]:
    release_models()
    yield
    release_models()


def use(key: str, built: list[str]) -> Any:
    def build() -> Any:
        built.append(key)
        return Model()

    with hold(key, build) as model:
        return model


def in_thread(work: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join(timeout=10)
    return found[0]


def test_the_next_shard_of_a_state_finds_its_model() -> None:
    built: list[str] = []
    assert use("a", built) is use("a", built)
    assert built == ["a"]


def test_another_model_drops_the_first_before_it_is_built() -> None:
    first = weakref.ref(use("a", []))
    assert first() is not None

    def build() -> Any:
        assert first() is None
        return Model()

    with hold("b", build):  # type: ignore[arg-type]
        pass
    built: list[str] = []
    use("a", built)
    assert built == ["a"]


def test_another_state_of_a_model_is_put_in_and_the_same_one_is_not() -> None:
    put: list[str] = []
    for state in ("1", "1", "2", None, "2"):
        with hold("a", Model, state, lambda model, state=state: put.append(str(state))):  # type: ignore[arg-type, misc]
            pass
    assert put == ["1", "2", "None", "2"]  # after the caller's own parameters nobody knows which they are


def test_threads_have_models_of_their_own_which_go_with_them() -> None:
    mine = use("a", [])
    theirs = in_thread(lambda: weakref.ref(use("a", [])))
    assert theirs() is not mine
    assert theirs() is not None
    in_thread(lambda: use("a", []) and None)  # a load clears up behind threads that are gone
    assert theirs() is None
    assert use("a", []) is mine
    release_models()
    assert use("a", []) is not mine


def test_a_model_that_failed_is_not_used_again() -> None:
    built: list[str] = []
    with pytest.raises(RuntimeError), hold("a", Model):  # type: ignore[arg-type]
        raise RuntimeError
    use("a", built)
    assert built == ["a"]


def test_a_load_waits_for_measurements_and_later_ones_wait_for_it() -> None:
    guard = LoadGuard()
    order: list[str] = []
    begun = threading.Event()

    def load() -> None:
        begun.set()
        with guard.loading():
            order.append("load")
            time.sleep(0.05)
            order.append("loaded")

    def measure() -> None:
        with guard.measuring():
            order.append("second")

    with guard.measuring(), guard.measuring():
        loader = threading.Thread(target=load)
        loader.start()
        begun.wait(5)
        while not guard._waiting:
            time.sleep(0.001)
        late = threading.Thread(target=measure)
        late.start()
        time.sleep(0.05)
        order.append("first")
    loader.join(5)
    late.join(5)
    assert order == ["first", "load", "loaded", "second"]
