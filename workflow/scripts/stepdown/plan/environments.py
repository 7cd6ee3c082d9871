"""Whether jobs will find their packages: in environments of their own, or in the Python that runs Snakemake. Standard
library only."""

import importlib.util
import shutil
import sys

from ..errors import UserError

# What nearly every job imports.
OF_JOBS = ("torch", "transformers", "safetensors")


def check_conda() -> None:
    """`--use-conda` asks for conda, even to plan."""
    if shutil.which("conda") is None:
        raise UserError(
            "--use-conda: no conda on PATH; install conda 24.7.1 or later (docs/conda.md), or leave the option out: "
            "every rule then runs in this Python"
        )


def check_this_python() -> None:
    """Without environments of their own, jobs run in this Python."""
    missing = next((name for name in OF_JOBS if importlib.util.find_spec(name) is None), None)
    if missing:
        raise UserError(
            f"{sys.executable} has no {missing}, which jobs need; add --use-conda (docs/conda.md), or run Snakemake "
            "from the .venv that `make setup` makes"
        )
