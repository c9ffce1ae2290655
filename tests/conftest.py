from pathlib import Path

import pytest


@pytest.fixture
def root():
    "The repository's root"
    return Path(__file__).parents[1]
