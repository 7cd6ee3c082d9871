"""Packed three-tier models beside llama.cpp: tokens/s, bytes and perplexity, on one machine, taking turns in one run.

    python benchmarks/against_llama_cpp.py --output comparison                  # a random Llama of 1.1 B parameters
    python benchmarks/against_llama_cpp.py --output comparison --text TEXT \\
        --model results/iter0/model --packed results/iter5/packed               # a model of yours, packed in all values

llama.cpp runs the dense model in BF16, Q8_0, Q4_0 and Q4_K_M, each quantised by its own `llama_model_quantize` from the
file that the rule `gguf` writes. It is left out where its binding is missing, which must be built for the machine:

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python    # a quarter of an hour on two cores

On some processors with AMX its own buffers end in an illegal instruction; `--no-extra-buffers` avoids them.

A turn is a prompt of 128, one of 512 and 32 tokens one by one after a prompt of 16, the same tokens for all, of which
only the last has logits. Perplexity is by this project's protocol: GGUF files and quantised folders (`--quantised`) as
what their weights stand for in bf16, packed folders as they run. `floor` is what reading the weights that a token asks
for takes at the bandwidth measured in the same run. Written to `--output`: `comparison.json`
with every time, `comparison.txt`, and two figures.
"""

import argparse
import ctypes
import importlib.util
import math
import platform
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow/scripts"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from random_llama import BUNDLED, write_random_llama
from three_tiers import prune_by_magnitude

from stepdown.files import atomic_write, safetensors_header, write_json
from stepdown.measure.perplexity import batch_losses
from stepdown.measure.speed import load_model
from stepdown.models.checkpoint import Checkpoint
from stepdown.models.decoder import open_decoder
from stepdown.models.tier_maps import dense_tier_map, write_tier_map
from stepdown.packed.folder import VALUES, is_packed, read_index, write_packed
from stepdown.report import drawing

# By llama.cpp's names: its numbers of such files.
FILE_TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}
PROMPTS, SHORT = (128, 512), 16
NO_BINDING = "llama-cpp-python is not installed: CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"


# --- who is compared -------------------------------------------------------------------------------------------------


class InTorch:
    """A model of transformers, packed or not, one sequence at a time."""

    def __init__(self, folder: Path):
        self.model = load_model(folder, "cpu")

    @torch.no_grad()
    def prompt(self, tokens: list[int]) -> None:
        output = self.model(input_ids=torch.tensor([tokens]), use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values

    @torch.no_grad()
    def token(self, token: int) -> None:
        self.model(input_ids=torch.tensor([[token]]), past_key_values=self._cache, use_cache=True)


class InLlamaCpp:
    """A GGUF file in llama.cpp, one sequence at a time."""

    def __init__(self, file: Path, threads: int, extra_buffers: bool):
        import llama_cpp

        self._library = llama_cpp
        silence(llama_cpp)
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = extra_buffers
        self._model = llama_cpp.llama_model_load_from_file(str(file).encode(), options)
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = 2 * max(PROMPTS)
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, options)

    def prompt(self, tokens: list[int]) -> None:
        self._library.llama_memory_clear(self._library.llama_get_memory(self._context), True)
        self._decode(tokens)

    def token(self, token: int) -> None:
        self._decode([token])

    def _decode(self, tokens: list[int]) -> None:
        numbers = (ctypes.c_int32 * len(tokens))(*tokens)
        batch = self._library.llama_batch_get_one(numbers, len(tokens))
        # Of the numbers the batch knows the address only.
        if self._library.llama_decode(self._context, batch):
            raise SystemExit("llama.cpp could not compute these tokens")
        # Which waits until they are computed.
        self._library.llama_get_logits_ith(self._context, -1)


def silence(llama_cpp) -> None:
    """llama.cpp tells of everything it loads; the callback must outlive it."""
    silence.callback = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence.callback, ctypes.c_void_p())


@dataclass(frozen=True)
class Contender:
    """What is compared: its name, its folder or GGUF file, and what runs it; None where only its perplexity counts."""

    name: str
    path: Path
    run: Callable[[], InTorch | InLlamaCpp] | None


def contenders(model: Path, packed: Path, work: Path, arguments: argparse.Namespace) -> Iterator[Contender]:
    """All of them; what llama.cpp runs is written to `work`."""
    yield Contender("torch bf16", model, partial(InTorch, model))
    dense = work / "dense"
    if not dense.exists():
        pack_dense(model, dense, work)
    yield Contender("own dense bf16", dense, partial(InTorch, dense))
    for values in VALUES:
        yield Contender(f"three-tier {values}", packed / values, partial(InTorch, packed / values))
    for name, file in gguf_files(model, work).items() if has_llama_cpp() else ():
        run = partial(InLlamaCpp, file, arguments.threads, arguments.extra_buffers)
        yield Contender(f"llama.cpp {name}", file, run)
    for folder in arguments.quantised:
        yield Contender(quantised_name(folder), folder, None)


def has_llama_cpp() -> bool:
    return importlib.util.find_spec("llama_cpp") is not None


def quantised_name(folder: Path) -> str:
    """As the workflow names its steps: results/quantised/gptq4-g64/iter0/model."""
    return next((part for part in folder.parts[::-1] if re.match(r"(int|gptq)\d", part)), folder.name)


def pack_dense(model: Path, folder: Path, work: Path) -> None:
    """The model packed in bf16 with every block Dense: what our kernel makes of a model that is not pruned."""
    decoder = open_decoder(model, "cpu")
    shapes = {name: decoder.checkpoint.shape(f"{name}.weight") for name in decoder.linears()}
    tier_map = dense_tier_map(shapes, 16, 1, decoder.checkpoint.identity()["base_model"])
    write_tier_map(tier_map, work / "dense.safetensors")
    write_packed(Checkpoint(model), tier_map, work / "dense.safetensors", folder)


def gguf_files(model: Path, work: Path) -> dict[str, Path]:
    """The model as llama.cpp's files, in bf16 by the rule's own code and in the others by llama.cpp."""
    import llama_cpp

    from stepdown.models.gguf_export import export_gguf

    silence(llama_cpp)
    files = {name: work / f"model-{name}.gguf" for name in ("BF16", *FILE_TYPES)}
    if not files["BF16"].exists():
        export_gguf(model, files["BF16"], "bf16")
    for name, file_type in FILE_TYPES.items():
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.nthread = file_type, torch.get_num_threads()
        words = str(files["BF16"]).encode(), str(files[name]).encode(), ctypes.byref(options)
        if not files[name].exists() and llama_cpp.llama_model_quantize(*words):
            raise SystemExit(f"llama.cpp could not quantise {files['BF16']} to {name}")
    return files


def prepared(arguments: argparse.Namespace, work: Path) -> tuple[Path, Path]:
    """The dense model, and the folder that holds its packed ones, by values; made where none are given."""
    if arguments.model:
        return arguments.model, arguments.packed
    model, packed = BUNDLED if arguments.tiny else work / "model", work / "packed"
    if not model.exists():
        write_random_llama(model)
    if not packed.exists():
        packed.mkdir()
        checkpoint, tier_map = prune_by_magnitude(model, work / "pruned")
        for values in VALUES:
            write_packed(checkpoint, tier_map, work / "pruned/tier_map.safetensors", packed / values, values)
        shutil.rmtree(work / "pruned")
    return model, packed


# --- bytes -----------------------------------------------------------------------------------------------------------


def tensor_bytes(path: Path) -> dict[str, int]:
    """Name -> bytes of what a folder or a GGUF file holds."""
    if path.is_file():
        import gguf

        return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for file in path.glob("*.safetensors"):
        header, _ = safetensors_header(file)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found[name] = end - start
    return found


def sizes(path: Path, weights_of_layers: int) -> dict[str, float]:
    """`bytes` of all weights as stored; `read`: what a token asks for, without an embedding that is only looked up, and
    with a head of 8 bits where packed models have one; `bytes_per_weight` of the decoder layers alone."""
    found = tensor_bytes(path)
    layers = sum(size for name, size in found.items() if re.search(r"(layers|blk)\.\d+\.", name))
    # A head that is tied is stored as the embedding.
    heads = [size for name, size in found.items() if name.startswith(("lm_head.", "output."))]
    heads = heads or [size for name, size in found.items() if re.search("embed_tokens|token_embd", name)]
    of_whole_numbers = is_packed(path) and VALUES[read_index(path)["values"]]
    return {
        "bytes": sum(found.values()),
        "read": layers + sum(heads) // (2 if of_whole_numbers else 1),
        "bytes_per_weight": layers / weights_of_layers,
    }


# --- speed -----------------------------------------------------------------------------------------------------------


def seconds_of(runner: InTorch | InLlamaCpp, kind: str, tokens: list[int]) -> float:
    """Of a prompt of these tokens; or, for `decode`, of each of them one by one after a short prompt."""
    if kind == "decode":
        runner.prompt(tokens[:SHORT])
    # Threads of the one before that still wait for work fall asleep.
    time.sleep(0.05)
    start = time.perf_counter()
    if kind != "decode":
        runner.prompt(tokens)
        return time.perf_counter() - start
    for token in tokens[SHORT:]:
        runner.token(token)
    return (time.perf_counter() - start) / len(tokens[SHORT:])


def take_turns(runners: dict[str, InTorch | InLlamaCpp], kind: str, tokens: list[int], turns: int) -> dict[str, list]:
    """Name -> seconds of each turn, in which all are measured, in another order each time; the first does not count."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    order = random.Random(0)
    for _ in range(turns + 1):
        for name in order.sample(list(runners), len(runners)):
            found[name].append(seconds_of(runners[name], kind, tokens))
    return {name: times[1:] for name, times in found.items()}


def kinds(vocabulary: int, new_tokens: int) -> dict[str, list[int]]:
    """What is measured -> the tokens of it."""
    tokens = torch.randint(vocabulary, (max(PROMPTS),), generator=torch.Generator().manual_seed(0)).tolist()
    return {f"prompt of {count}": tokens[:count] for count in PROMPTS} | {"decode": tokens[: SHORT + new_tokens]}


def bandwidth(repeats: int = 7) -> float:
    """Bytes per second that torch reads with its threads, the best of a few sums over 1 GiB."""
    data = torch.ones(2**28)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / min(seconds)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# --- quality ---------------------------------------------------------------------------------------------------------


def text_windows(model: Path, arguments: argparse.Namespace) -> torch.Tensor:
    from stepdown.models.loading import load_tokenizer
    from stepdown.text import consecutive_windows, load_documents, parse_text, token_stream

    stream = token_stream(load_documents(parse_text(arguments.text), "test"), load_tokenizer(model))
    length = arguments.sequence_length
    return consecutive_windows(stream, length, max(1, arguments.tokens // length), arguments.text)


@torch.no_grad()
def perplexity(contender: Contender, windows: torch.Tensor) -> float:
    """By the protocol of `measure/perplexity.py`, a window at a time."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = contender.path
        if folder.is_file():
            from stepdown.models.gguf import import_gguf

            folder = Path(temporary) / "model"
            import_gguf(contender.path, folder)
        model = load_model(folder, "cpu")
        losses = [
            loss
            for window in windows.split(1)
            for loss in batch_losses(window, model(input_ids=window, use_cache=False).logits)
        ]
    return torch.stack(losses).mean().exp().item()


# --- what it comes to ------------------------------------------------------------------------------------------------


def compare(model: Path, packed: Path, work: Path, arguments: argparse.Namespace) -> dict:
    found = {contender.name: contender for contender in contenders(model, packed, work, arguments)}
    decoder = open_decoder(model, "cpu")
    weights = sum(linear.weight.numel() for linear in decoder.linears().values())
    models = {name: sizes(contender.path, weights) for name, contender in found.items()}
    if arguments.text:
        windows = text_windows(model, arguments)
        for name, contender in found.items():
            models[name]["perplexity"] = perplexity(contender, windows)
    runners = {name: contender.run() for name, contender in found.items() if contender.run}
    for kind, tokens in kinds(decoder.model.config.vocab_size, arguments.new_tokens).items():
        for name, times in take_turns(runners, kind, tokens, arguments.turns).items():
            models[name].setdefault("seconds", {})[kind] = times
    return about(arguments) | {"bandwidth": bandwidth(), "models": models}


def about(arguments: argparse.Namespace) -> dict:
    """Where and how it was measured."""
    found = {"processor": processor(), "threads": arguments.threads, "turns": arguments.turns}
    found |= {"new_tokens": arguments.new_tokens, "skipped": [] if has_llama_cpp() else [NO_BINDING]}
    if arguments.text:
        found |= {"sequence_length": arguments.sequence_length, "tokens": arguments.tokens}
    return found


def speed(times: list[float], kind: str) -> tuple[float, float, float]:
    """Tokens/s by the median, the slowest and the fastest turn."""
    tokens = 1 if kind == "decode" else int(kind.rpartition(" ")[2])
    return tuple(tokens / seconds for seconds in (statistics.median(times), max(times), min(times)))


def as_text(found: dict) -> str:
    """A table: bytes, tokens/s by the median, the slowest and the fastest turn, a token and its floor, perplexity."""
    lines = [f"{found['processor']}, {found['threads']} threads, {found['bandwidth'] / 1e9:.1f} GB/s read by torch"]
    lines += [f"left out: {reason}" for reason in found["skipped"]]
    kinds = list(next(iter(found["models"].values()))["seconds"])
    titles = [*(f"{kind} /s" for kind in kinds), "ms a token", "floor", "perplexity"]
    lines.append(f"{'':18}{'MB':>8}{'B/weight':>10}" + "".join(f"{title:>24}" for title in titles[: len(kinds)]))
    lines[-1] += "".join(f"{title:>12}" for title in titles[len(kinds) :])
    for name, model in found["models"].items():
        line = f"{name:18}{model['bytes'] / 1e6:8.1f}{model['bytes_per_weight']:10.3f}"
        for kind in kinds:
            cell = "{:.1f} ({:.1f}-{:.1f})".format(*speed(model["seconds"][kind], kind)) if "seconds" in model else ""
            line += f"{cell:>24}"
        token = f"{1000 * statistics.median(model['seconds']['decode']):.2f}" if "seconds" in model else ""
        quality = f"{model['perplexity']:.2f}" if "perplexity" in model else ""
        line += f"{token:>12}{1000 * model['read'] / found['bandwidth']:12.2f}{quality:>12}"
        lines.append(line.rstrip())
    return "\n".join(lines) + "\n"


COLOURS = {"three-tier": drawing.CHAIN_COLOUR, "llama.cpp": drawing.ONE_SHOT_COLOURS[0], "": drawing.GREY}


def figure(points: dict[str, tuple[float, float]], x_label: str, y_label: str, logarithmic: bool = False):
    """A named point for each model; whose it is is told by its colour."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(drawing.WIDTH, 4.3), layout="constrained")
    axes = drawn.subplots()
    # Models of the same bytes are often as fast, or as good: names stand on several sides.
    places = {"three-tier": (2, 7), "llama.cpp": (7, 4), "": (-8, -12)}
    for whose, colour in COLOURS.items():
        own = {name: at for name, at in points.items() if whose == next(filter(name.startswith, COLOURS))}
        across, up = ([at[axis] for at in own.values()] for axis in (0, 1))
        axes.plot(across, up, "o", color=colour, label=whose or "others", zorder=4)
        for name, at in own.items():
            look = {"xytext": places[whose], "textcoords": "offset points", "path_effects": drawing.HALO, "fontsize": 9}
            look["horizontalalignment"] = "left" if places[whose][0] > 0 else "right"
            axes.annotate(name.removeprefix(whose).strip(), at, color=colour, **look)
    axes.legend(loc="upper right", frameon=False)
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:.0f}")
        axes.yaxis.set_minor_formatter("{x:.0f}")
    axes.margins(y=0.1)
    axes.set_xlim(0, 1.25 * max(x for x, _ in points.values()))
    axes.set(xlabel=x_label, ylabel=y_label)
    return drawn


def write_figures(found: dict, folder: Path) -> None:
    models = found["models"]
    timed = {name: model for name, model in models.items() if "seconds" in model}
    decode = {name: speed(model["seconds"]["decode"], "decode")[0] for name, model in timed.items()}
    speeds = {name: (model["bytes"] / 1e6, decode[name]) for name, model in timed.items()}
    quality = {
        name: (model["bytes_per_weight"], model["perplexity"])
        for name, model in models.items()
        if math.isfinite(model.get("perplexity", math.inf))
    }
    with drawing.style():
        drawn = figure(speeds, "weights (MB)", f"decode, tokens/s ({found['threads']} threads)")
        atomic_write(folder / "speed.svg", drawing.as_svg(drawn))
        if quality:
            drawn = figure(quality, "bytes per weight, embedding and head aside", "perplexity", logarithmic=True)
            atomic_write(folder / "perplexity.svg", drawing.as_svg(drawn))


def main(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        found = compare(*prepared(arguments, work), work, arguments)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "comparison.json", found)
    atomic_write(arguments.output / "comparison.txt", as_text(found))
    write_figures(found, arguments.output)
    print(as_text(found), end="")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of the dense model (default: a random one)")
    parser.add_argument("--packed", type=Path, help="folder that holds it packed: bf16, int8, int4")
    parser.add_argument("--quantised", type=Path, nargs="*", default=[], help="quantised folders, for their perplexity")
    parser.add_argument("--text", help="text to evaluate on (default: no perplexity)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text's test split (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--turns", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--new-tokens", type=int, default=32, help="of a turn, one by one (default: %(default)s)")
    parser.add_argument("--no-extra-buffers", dest="extra_buffers", action="store_false", help="of llama.cpp")
    parser.add_argument("--tiny", action="store_true", help="the bundled model in place of the random one")
    parser.add_argument("--work", type=Path, help="keep what is made on the way here (default: nowhere)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the figures")
    arguments = parser.parse_args()
    if (arguments.model is None) != (arguments.packed is None):
        parser.error("give --model and --packed, or neither")
    return arguments


if __name__ == "__main__":
    main(parsed())
