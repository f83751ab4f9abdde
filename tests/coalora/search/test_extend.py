"""Random extension: new, distinct, allowed, reproducible."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.search.extend import extend_at_random

NEIGHBOURS = np.array([[1, -1], [0, 2], [1, -1]])
SET = np.array([[0, 0, 0, 0], [2, 2, 2, 2]])


def test_an_extension_is_new_distinct_allowed_and_decided_by_its_seed() -> None:
    allowed = np.ones((4, 3), dtype=bool)
    allowed[0, 1] = False
    found = extend_at_random(SET, NEIGHBOURS, 4, n_candidates=10, seed=1, allowed=allowed)
    assert len({tuple(row) for row in np.concatenate([SET, found])}) == 12
    assert allowed[np.arange(4), found].all()
    again = extend_at_random(SET, NEIGHBOURS, 4, n_candidates=10, seed=1, allowed=allowed)
    np.testing.assert_array_equal(found, again)
    assert (found != extend_at_random(SET, NEIGHBOURS, 4, n_candidates=10, seed=2, allowed=allowed)).any()


def test_a_space_that_is_used_up_gives_fewer_and_a_forbidden_set_is_refused() -> None:
    assert len(extend_at_random([[0], [1]], NEIGHBOURS, 1, n_candidates=5, seed=0)) == 1
    allowed = np.array([[False, True, False]])
    with pytest.raises(CoaloraError, match="allowed"):
        extend_at_random([[0]], NEIGHBOURS, 1, n_candidates=1, seed=0, allowed=allowed)
