"""Whether jobs will find their packages, told before the first of them."""

import importlib.util
import shutil

import pytest

from stepdown.errors import UserError
from stepdown.plan import environments


def test_conda_is_asked_for_where_it_is_not(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/somewhere/{name}")
    environments.check_conda()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"^--use-conda: no conda on PATH; install conda"):
        environments.check_conda()


def test_a_python_without_the_packages_of_jobs(monkeypatch):
    environments.check_this_python()
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: find(name) if name != "safetensors" else None)
    with pytest.raises(UserError, match=r"has no safetensors, which jobs need; add --use-conda"):
        environments.check_this_python()
