"""What tests of whole meshes share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.running import DEMO_MODEL, RunningMesh, running_mesh

# Whatever else the machine does meanwhile, nothing is held against a clock.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def mesh() -> Iterator[RunningMesh]:
    """The demo checkpoint, each expert of a layer in a worker of its own. Leave it whole."""
    with running_mesh("--model", DEMO_MODEL) as mesh:
        yield mesh
