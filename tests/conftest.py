import os
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1') # rows are compared to the last digit


@pytest.fixture
def root():
    "The repository's root"
    return Path(__file__).parents[1]
