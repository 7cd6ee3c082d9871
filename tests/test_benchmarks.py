"""Benchmarks that compare with others run where these are not installed."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_packed_models_beside_llama_cpp(tmp_path):
    words = ["--tiny", "--turns", "1", "--new-tokens", "2", "--output", tmp_path / "out", "--work", tmp_path / "work"]
    words += ["--text", "pydoc", "--sequence-length", "256", "--tokens", "1024"]
    finished = subprocess.run(
        [sys.executable, ROOT / "benchmarks/against_llama_cpp.py", *words], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "out/comparison.txt").read_text() == finished.stdout
    assert all((tmp_path / f"out/{name}.svg").read_text().startswith("<?xml") for name in ("speed", "perplexity"))
    found = json.loads((tmp_path / "out/comparison.json").read_text())
    models = found["models"]
    assert bool(found["skipped"]) == (not any(name.startswith("llama.cpp") for name in models))
    assert bool(found["skipped"]) == (importlib.util.find_spec("llama_cpp") is None)
    assert all(model["seconds"].keys() == {"prompt of 128", "prompt of 512", "decode"} for model in models.values())
    dense = models["torch bf16"]
    for name, size in (("torch bf16", 2.0), ("own dense bf16", 2.0), ("bf16", 1.23), ("int8", 0.67), ("int4", 0.43)):
        model = models.get(name) or models[f"three-tier {name}"]
        # Norms are counted with the layers, and so are scales of rows of 256 weights.
        assert model["bytes_per_weight"] == pytest.approx(size, abs=0.03), name
        assert (model["read"] < 0.95 * model["bytes"]) == (name in ("int8", "int4")), "whose head has 8 bits"
    # Pruned at random, so that the model is bad, but alike in all values.
    bf16, int8 = (models[f"three-tier {values}"]["perplexity"] for values in ("bf16", "int8"))
    assert models["own dense bf16"]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-2)
    assert int8 == pytest.approx(bf16, rel=0.05) and bf16 > dense["perplexity"]
