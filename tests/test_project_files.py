"""What stands beside the code agrees with it: versions, links between pages, what the CI calls."""

import re
from pathlib import Path

import pytest
import yaml

from stepdown.version import __version__

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page
    for pattern in ("*.md", "config/*.md", "docs/*.md", "profiles/*.md", "resources/*/*.md")
    for page in ROOT.glob(pattern)
)


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.search(r"^## \[(\d.*)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert (citation["version"], citation["date-released"]) == released.groups()
    assert citation["version"] == __version__


def anchors(page):
    """What GitHub names the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text()
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in index + "README.md"]


def test_the_ci_calls_targets_of_the_makefile():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            assert job["runs-on"]
            called |= {step["run"] for step in job["steps"] if "run" in step}
    assert called == {f"make {target}" for target in ("lint", "test", "test-conda", "wheel")}
    assert {command.removeprefix("make ") for command in called} <= targets
