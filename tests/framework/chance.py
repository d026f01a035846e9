"""Tests that choose moments at random, and can choose the same ones again."""

import os
import random

import pytest


@pytest.fixture
def chance() -> random.Random:
    """Seeded anew for each test, or by RINGSTONE_TEST_SEED; a test that fails shows the seed."""
    seed = int(os.environ.get("RINGSTONE_TEST_SEED") or random.SystemRandom().getrandbits(32))
    print(f"RINGSTONE_TEST_SEED={seed}")
    return random.Random(seed)
