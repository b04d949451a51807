"""A few cases of each kind, with the same seeds every time."""

from __future__ import annotations

import pytest

from .kinds import KINDS

pytestmark = pytest.mark.filterwarnings("ignore:Unfeasible length constraints")
SAMPLES = [(kind, seed) for kind in KINDS for seed in KINDS[kind].samples]


@pytest.mark.parametrize(("kind", "seed"), SAMPLES, ids=lambda x: str(x))
def test_sample(kind: str, seed: int):
    KINDS[kind].sample(seed)
