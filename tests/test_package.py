"""The package as others get it: a wheel that holds all of it, runs a packed model anywhere, and asks for little."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_rooms import MODULES, PACKAGE, imports
from three_tiers import pack_model

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [Requirement(line) for line in PROJECT["dependencies"]]
# llama.cpp is for a benchmark only, and nothing here installs it.
EXTRAS = {extra: lines for extra, lines in PROJECT["optional-dependencies"].items() if extra != "llama-cpp"}
OPTIONAL = [Requirement(line) for lines in EXTRAS.values() for line in lines]
IMPORTED_AS = {"pyyaml": "yaml"}
BROUGHT_ALONG = {"PyYAML"}  # by transformers


def module_of(requirement):
    name = requirement.name.lower().replace("-", "_")
    return IMPORTED_AS.get(name, name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built by way of the sdist, from a copy: building leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    without_caches = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "workflow/scripts", folder / "workflow/scripts", ignore=without_caches)
    finished = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation"], cwd=folder, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-2000:]
    return next((folder / "dist").glob("*.whl"))


def test_wheel_holds_every_file_of_the_package_and_no_script(wheel):
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix != ".pyc"}
    package = {path.relative_to(PACKAGE.parent).as_posix() for path in files}
    kernels = {"stepdown/packed/kernels/three_tier.cpp", "stepdown/packed/kernels/matrix.h"}
    assert {"stepdown/py.typed", "stepdown/__init__.pyi", *kernels} <= package
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == package
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


# With nothing of the optional packages in sight.
GENERATE = """
import sys
sys.modules.update(dict.fromkeys({absent}))
import stepdown, torch
model = stepdown.load_packed("packed")
tokens = model.generate(torch.arange(1, 6)[None], max_new_tokens=8, do_sample=False)
print(stepdown.__file__, stepdown.__version__, tokens.tolist())
"""


def test_installed_package_loads_a_packed_model_and_generates(wheel, tmp_path):
    pack_model(ROOT / "resources/pydoc-llama", tmp_path)
    site, cache = tmp_path / "site", tmp_path / "cache"
    zipfile.ZipFile(wheel).extractall(site)
    installed = sorted(site.rglob("*"))
    code = GENERATE.format(absent=[module_of(name) for name in OPTIONAL if name.name not in BROUGHT_ALONG])
    environment = os.environ | {"PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-2000:]
    place, version, tokens = finished.stdout.strip().split(maxsplit=2)
    assert (place, version) == (str(site / "stepdown/__init__.py"), wheel.name.split("-")[1])
    assert json.loads(tokens)[0][:5] == [1, 2, 3, 4, 5] and len(json.loads(tokens)[0]) == 13
    assert sorted(site.rglob("*")) == installed


def test_every_import_is_a_dependency():
    declared = {module_of(name) for name in NEEDED + OPTIONAL} | {"triton"}  # which a torch with CUDA brings along
    named = {name[1] for module in MODULES for name in imports(module) if not name[0]}
    assert named - sys.stdlib_module_names <= declared


def test_ranges_admit_what_is_tested():
    pins = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    pins |= dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    for requirement in NEEDED + OPTIONAL:
        assert requirement.specifier.contains(pins[requirement.name]), requirement
