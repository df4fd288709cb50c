"""The folder of research data, if there is one: SUBSPACE_META_DATA, or shared/data beside the repository."""

import os
from pathlib import Path

import pytest

from subspace_meta.tasks.data import DATA_VARIABLE

BESIDE = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def _the_folder_beside_the_repository():
    if DATA_VARIABLE not in os.environ and BESIDE.is_dir():
        os.environ[DATA_VARIABLE] = str(BESIDE)
        yield
        del os.environ[DATA_VARIABLE]
    else:
        yield


@pytest.fixture
def data_folder():
    """Skip unless the folder is there."""
    if not Path(os.environ.get(DATA_VARIABLE, "/dev/null")).is_dir():
        pytest.skip(f"needs the research data: set {DATA_VARIABLE}, or put them in {BESIDE}")
