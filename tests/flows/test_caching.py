"""What runs again and what does not: after nothing, a setting, an edit, a kill."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.flows.checkout import Checkout, computed, files, reused

# Long enough to be killed in; everything else is tiny.
LONG_ROUNDS = "training.round_steps=60"


@pytest.fixture(scope="module")
def direct(make_checkout: Callable[[str], Checkout]) -> Checkout:
    """A checkout whose stages have all run once, without a server."""
    checkout = make_checkout("direct")
    output = checkout.stage("export")
    assert "train" in computed(output)
    return checkout


def test_changing_a_search_setting_runs_the_rounds_and_what_follows(direct: Checkout) -> None:
    output = direct.stage("export", "search.candidates=2")
    assert reused(output)[:5] == ["base", "benchmark", "calibrate", "initial-set", "train"]
    assert computed(output)[0] == "search"
    # Shared-LoRA's first round saw the same set as before.
    assert reused(output).count("train") == 3


def test_changing_a_budget_trains_nothing(direct: Checkout) -> None:
    output = direct.stage("export", "evaluation.budgets=[2.75]")
    assert not {"train", "search", "calibrate"} & set(computed(output))
    assert "select" in computed(output)


def test_editing_a_file_runs_the_stages_that_use_it_again(direct: Checkout) -> None:
    source = direct.root / "coalora" / "evaluate" / "compare.py"
    original = source.read_text()
    try:
        # A comment changes no result, code does.
        source.write_text(original + "# a remark\n")
        assert computed(direct.stage("export")) == []
        source.write_text(original + "\n_EDITED = True\n")
        assert computed(direct.stage("export")) == [
            "result"
        ]  # which comes out the same, so that nothing after it has to run
    finally:
        source.write_text(original)


@pytest.mark.parametrize("damage", ["delete", "alter"])
def test_a_damaged_result_is_detected_and_rebuilt(direct: Checkout, damage: str) -> None:
    found = direct.root.glob(".coalora/store/*/*/statistics.safetensors")
    (target,) = [file for file in found if not (file.parent / "bundle.json").exists()]  # which carries them, too
    before = target.read_bytes()
    target.chmod(0o644)
    if damage == "delete":
        target.unlink()
    else:
        target.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    output = direct.stage("calibration")
    assert computed(output) == ["calibrate"]
    assert "stored result is rebuilt" in output
    assert target.read_bytes() == before


def test_a_run_killed_in_round_2_resumes_and_ends_bit_for_bit_as_an_undisturbed_one(
    make_checkout: Callable[[str], Checkout],
) -> None:
    killed, undisturbed = make_checkout("killed"), make_checkout("undisturbed")
    # A checkpoint after every step; the undisturbed run writes none.
    command = ("-m", "coalora", "run", "tiny", "--set", LONG_ROUNDS, "stages.checkpoint_seconds=0.001")
    printed = killed.kill_at("training coa, round 2: ", *command)
    done = computed(printed)
    assert done.count("search") == 2
    assert not killed.latest.exists()

    resumed = killed.run(*command)
    assert reused(resumed)[: len(done)] == done
    assert computed(resumed)[0] == "train"
    assert "resumed from the checkpoint at step" in resumed
    assert not list(killed.root.glob(".coalora/checkpoints/*"))

    undisturbed.stage("export", LONG_ROUNDS, "stages.checkpoint_seconds=null")
    for part in ("bundle", "2.5-bits", "3-bits"):
        inside = "bundle" if part == "bundle" else f"export/{part}"
        assert files(killed.latest / inside) == files(undisturbed.root / "outputs" / "export" / part)
    for name in ("metrics.json", "front.csv", "curves.csv"):
        ours = (killed.latest / "report" / name).read_bytes()
        assert ours == (undisturbed.root / "outputs" / "report" / name).read_bytes()
