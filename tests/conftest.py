import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault('OMP_NUM_THREADS', '1') # rows are compared to the last digit


@pytest.fixture
def root():
    "The repository's root"
    return Path(__file__).parents[1]


def pytest_terminal_summary(terminalreporter):
    "How many bad inputs were tried"
    tried = getattr(sys.modules.get('test_bad_input'), 'count', 0)
    if tried: terminalreporter.write_line(f'{tried} bad inputs were tried')
