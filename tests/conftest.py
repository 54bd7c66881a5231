"""What all tests share: a seed for each, and how hard Hypothesis looks."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import tinygrad_seq as tgs

settings.register_profile(
    "suite",
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Numbers that differ from test to test but not from run to run."""
    seed = zlib.crc32(request.node.nodeid.encode())
    tgs.manual_seed(seed)
    return np.random.default_rng(seed)
