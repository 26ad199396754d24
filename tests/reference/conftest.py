"""A reference by NUTS, made once for all tests."""

import pytest
import torch

from tests.reference.models import location_scale
from vi_toolkit.reference import Reference


@pytest.fixture(scope="session")
def y():
    return torch.randn(100, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 1


@pytest.fixture(scope="session")
def nuts(y):
    return Reference.nuts(
        location_scale,
        {"y": y},
        chains=2,
        num_draws=1200,
        warmup=250,
        progress=False,
        target_accept=0.9,
    )
