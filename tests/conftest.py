"""What several test files share."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Slow shared machines must not make a property test fail for its time.
settings.register_profile("stepdown", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("stepdown")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Read when torch is loaded: sums over several threads can differ in the last bit, and small tensors gain nothing.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).parents[1]


def pytest_configure() -> None:
    """Where there is no GPU its kernels are interpreted; Triton reads that when anything first loads it."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest goes first: one process runs the whole workflow, while another one only plans it."""
    first = ("test_imports.py", "test_workflow_plan.py")
    items.sort(key=lambda item: (item.path.name not in first, item.path.parent.name != "workflow"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference results, texts and models beside the project; tests that need them skip where they are missing."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the shared folder with reference results and data is not beside the project")
    return folder


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden"


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which the whole workflow has run once, undisturbed; for looking only."""
    from projects import make_project, snakemake

    folder = make_project(tmp_path_factory.mktemp("project"))
    finished = snakemake(folder)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder
