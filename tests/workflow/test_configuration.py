"""The schema of the configuration, and the page that tells people what is in it."""

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
PAGE = (ROOT / "config/README.md").read_text()


def entries(properties, above=""):
    """Every key with its entry in the schema, sections before what is in them: "recovery.lora.rank"."""
    for name, entry in properties.items():
        if "$ref" in entry:
            entry = SCHEMA["$defs"][entry["$ref"].rpartition("/")[2]] | entry
        yield above + name, entry
        if entry.get("type") == "object":
            yield from entries(entry.get("properties", {}), f"{above}{name}.")


def is_section(entry):
    return entry.get("type") == "object" and "properties" in entry


KEYS = {key: entry for key, entry in entries(SCHEMA["properties"]) if not is_section(entry)}
SECTIONS = {key: entry for key, entry in entries(SCHEMA["properties"]) if is_section(entry)}


def plain(text):
    """Markdown as the schema has it: links by their words, bars not escaped."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("\\|", "|")


def rows(page):
    """Each row of the tables of keys, in order: key, meaning, default."""
    section = ""
    for paragraph in page.partition("\n## ")[0].split("\n\n"):
        heading = re.match(r"`(\w+)`: ", paragraph)
        section = f"{heading[1]}." if heading else section
        for key, meaning, default in re.findall(r"^\| `([\w.]+)` \| (.*) \| `(.*)` \|$", paragraph, re.MULTILINE):
            yield section + key, plain(meaning), yaml.safe_load(default)


def test_the_page_says_what_the_schema_says():
    assert list(rows(PAGE)) == [(key, entry["description"], entry["default"]) for key, entry in KEYS.items()]


@pytest.mark.parametrize("section", [section for section in SECTIONS if "." not in section])
def test_the_page_introduces_every_section(section):
    heading = re.search(rf"^`{section}`: (.*?)\n\n", PAGE, re.MULTILINE | re.DOTALL)
    assert plain(" ".join(heading[1].split())) == SECTIONS[section]["description"]


def test_every_key_has_a_description_and_a_default_that_fits():
    Draft202012Validator.check_schema(SCHEMA)
    assert all(entry["description"] for entry in SECTIONS.values())
    for entry in KEYS.values():
        assert Draft202012Validator(entry | {"$defs": SCHEMA["$defs"]}).is_valid(entry["default"])
