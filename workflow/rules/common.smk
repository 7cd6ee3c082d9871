# What the rules share: the checked configuration, the schedule, and where a step's files are.

import ast
import hashlib
import json
import os
import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import yaml

ROOT = Path(workflow.basedir)
SCRIPTS = Path(os.path.relpath(ROOT / "workflow/scripts"))
sys.path.append(str(SCRIPTS))

from stepdown.plan.compressions import check_step, parse_step
from stepdown.errors import UserError
from stepdown.prune.methods import method_names
from stepdown.plan.preflight import SPLITS_READ, check_inputs, check_writable, complete_config, local_model, text_files
from stepdown.plan.runs import parse_gradual, parse_run
from stepdown.plan.schedule import one_shot, read_schedule


@contextmanager
def one_line():
    """A mistake of the user's ends the run with its line: the one way out of a Snakefile that prints nothing else."""
    try:
        yield
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}")


with one_line():
    config.update(complete_config(config, yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())))
    SCHEDULE = read_schedule(config["schedule"]) if config["schedule"] else []
    check_inputs(config)
    check_writable(Path(), Path(".snakemake"), Path("results"))
    # Steps without a tier map, each pruned by the method and pattern of its name.
    RUNS = {f"oneshot/{name}": parse_run(name, method_names()) for name in config["oneshot"] if name != "three-tier"}
    # Steps that are no pruning of weights one by one: smaller models, whole numbers, sparse activations.
    for step in config["compressions"]:
        check_step(step, local_model(config["model"]))
    RUNS |= {f"gradual/{name}": parse_gradual(name, method_names()) for name in config["gradual"]["runs"]}

STEPS = [f"iter{row.iteration}" for row in SCHEDULE]
STEPS += [f"oneshot/{name}" for name in config["oneshot"] if name == "three-tier"]

# Of the chain and what is like it, by tiers; and of every run there is.
EVALS = expand("results/{step}/eval.json", step=["iter0", *STEPS])
ALL_STEPS = ["iter0", *STEPS, *RUNS, *config["compressions"]]
ALL_EVALS = expand("results/{step}/eval.json", step=ALL_STEPS)
ZERO_SHOT = expand(
    "results/{step}/zero_shot.json", step=["iter0", *STEPS, *RUNS] if config["zero_shot"]["tasks"] else []
)
MEASUREMENTS = ["results/measurements.json"] if config["speed"]["measured"] else []
TRAINING = expand("results/{step}/training.json", step=STEPS)
TIER_MAPS = expand("results/{step}/tier_map.safetensors", step=STEPS)

# A step asks for the step before it: Python's default of 1000 frames ends at 96 iterations.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 20 * len(SCHEDULE)))

# `python` is this interpreter where no conda environment is active, and that environment's where one is;
# what stands in ~/.local is part of neither.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]), PYTHONNOUSERSITE="1"
)
# Threads that wait by spinning make everything several times slower as soon as the machine does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


# --- steps and their files -------------------------------------------------------------------------------------------


def row(step):
    """The row of the schedule that a step follows."""
    if not SCHEDULE:
        raise SystemExit(
            f"error: results/{step}: config key schedule is null; name a schedule, whose rows make its tiers"
        )
    if step.startswith("oneshot/"):
        return one_shot(SCHEDULE)
    number = int(step.removeprefix("iter"))
    if number > len(SCHEDULE):
        raise SystemExit(
            f"error: results/{step}: {config['schedule']} has {len(SCHEDULE)} rows; add a row or ask for less"
        )
    return SCHEDULE[number - 1]


def previous(step):
    """The step whose finetuned model this one starts from; a one-shot run starts from the base model."""
    return f"iter{row(step).iteration - 1}"


def statistics(step):
    """The step whose calibration and scores serve this one: a one-shot run has its base model in common with iter1."""
    return f"iter{row(step).iteration}"


def model_folder(step):
    """The folder of a step's finished model; sparse activations are switched on in that of another step."""
    if step.startswith("dynamic/"):
        return model_folder(source(step))
    return (
        f"results/{step}/finetuned_model"
        if step.startswith(("iter", "oneshot/", "gradual/")) and step != "iter0"
        else f"results/{step}/model"
    )


def model_ready(step):
    """The file that is written last when a step's model is complete.

    The base model may be links to the user's own files, and Snakemake deletes what is declared as output: its tier map
    stands for it.
    """
    if step.startswith("dynamic/"):
        return model_ready(source(step))
    return tier_map(step) if step == "iter0" else f"{model_folder(step)}/model.safetensors.index.json"


def source(step):
    """The step whose model is quantised, or runs on sparse activations: results/quantised/NAME/STEP."""
    return step.split("/", 2)[2]


def compression(step):
    """The name in a compressed step, once it is known to ask for something."""
    try:
        check_step(step, local_model(config["model"]))
    except UserError as error:
        raise SystemExit(f"error: {error}")
    return step.split("/")[1]


def compression_report(step):
    """The file that says how a step was made smaller, quantised or made sparse."""
    names = {"structured": "pruning", "quantised": "quantisation", "dynamic": "thresholds"}
    return f"results/{step}/{names[step.split('/')[0]]}.json"


def tier_map(step):
    return f"results/{step}/tier_map.safetensors"


def is_run(step):
    """Whether a step is pruned by what its name says; the iterations and oneshot/three-tier go by the schedule."""
    return step.startswith(("oneshot/", "gradual/")) and step != "oneshot/three-tier"


def run_of(step):
    """What the name of a one-shot run asks for."""
    try:
        return parse_run(step.removeprefix("oneshot/"), method_names())
    except UserError as error:
        raise SystemExit(f"error: {error}")


def gradual_run(name):
    """The name of a run whose masks are chosen while the model trains, once it is known to ask for something."""
    try:
        return parse_gradual(name, method_names()).name
    except UserError as error:
        raise SystemExit(f"error: {error}")


def masks(step):
    """The file that says what must stay zero in a step's checkpoint: its tier map, or the report of a run."""
    return f"results/{step}/pruning.json" if is_run(step) else tier_map(step)


def epochs(step):
    """Epochs of finetuning after a step."""
    return config["oneshot_epochs"] if is_run(step) else row(step).epochs


def is_refitted(step):
    """Whether a step's pruned model is refitted before it is finetuned."""
    return config["oneshot_refit"] if is_run(step) else config["refit"]


def start_folder(step):
    """The model that a step's finetuning starts from."""
    return f"results/{step}/{'refitted' if is_refitted(step) else 'pruned'}_model"


# --- what reruns a rule ----------------------------------------------------------------------------------------------


@cache
def code_hash(script):
    """Hash of a script and of the modules beside it that it imports, directly or not, as parsed: comments do not count."""
    found, waiting = set(), [SCRIPTS / script]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += parsed(path)[1]
    dumps = [f"{path.relative_to(SCRIPTS)} {parsed(path)[0]}" for path in sorted(found)]
    return hashlib.sha256("\n".join(dumps).encode()).hexdigest()[:16]


@cache
def parsed(path):
    """The syntax tree of a file, hashed, and the files beside it that it imports."""
    tree = ast.parse(path.read_bytes())
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported_files(path, tree)


def imported_files(path, tree):
    """The files below workflow/scripts that the import statements of a module name, packages on the way included."""
    package = path.parent.relative_to(SCRIPTS).parts
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            start += tuple(node.module.split(".")) if node.module else ()
            names.update({start, *((*start, alias.name) for alias in node.names)})
    modules = {SCRIPTS.joinpath(*name[:end]) for name in names for end in range(1, len(name) + 1)}
    candidates = {file for module in modules for file in (module.with_suffix(".py"), module / "__init__.py")}
    return [file for file in candidates if file.is_file()]


@cache
def fingerprint(path):
    """Size and hash of a file, never its date: of a large one, the hash of 256 pieces of 64 KiB spread evenly over it."""
    piece, pieces = 1 << 16, 256
    size = path.stat().st_size
    step = max(piece, size // pieces)
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, step):
            file.seek(start)
            digest.update(file.read(piece))
    return f"{size} {digest.hexdigest()[:16]}"


def model_fingerprint():
    """What the files of a local model hold; a hub id and its revision say it themselves."""
    folder = local_model(config["model"])
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md") if folder else []
    return [f"{path.name} {fingerprint(path)}" for path in files]


LLAMA_2_7B = 13.5e9


def model_size(model):
    """Bytes of the weights of a local model; a hub id counts as Llama-2-7B."""
    files = local_model(model).iterdir() if local_model(model) else []
    return sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".bin")) or LLAMA_2_7B


def text_fingerprint(section):
    """What the local files hold that a section of the configuration reads."""
    return [fingerprint(path) for text in texts(section) for path in text_files(text, SPLITS_READ[section])]


def task_fingerprint():
    """What the YAML files hold that describe zero-shot tasks of the user's own."""
    folder = config["zero_shot"]["task_folder"]
    return [fingerprint(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()] if folder else []


# --- command lines ---------------------------------------------------------------------------------------------------

# In results a model is called what the configuration calls it, but where on this machine it lies is nobody's business.
MODEL_NAME = Path(config["model"]).name if os.path.isabs(config["model"]) else config["model"]
TRUST = ["--trust-remote-code"] if config["trust_remote_code"] else []
# `auto` takes a GPU it finds; only `cuda` has a cluster look for one.
GPUS = int(config["device"] == "cuda")
# As a share of Llama-2-7B.
MODEL_SIZE = model_size(config["model"]) / LLAMA_2_7B
# Planning and reporting are told of no number.
CORES = workflow.resource_settings.cores or 16
# What rules with much to compute ask for: half the cores, since the iterations and the one-shot run are two chains that
# can go on side by side. A profile's set-threads sets it.
THREADS = max(1, min(8, CORES // 2))


def memory(mb):
    """Memory of a job: `mb` for Llama-2-7B, in proportion for other models, 3000 at least; each retry gets twice as much."""
    return lambda wildcards, attempt: max(3000, int(mb * MODEL_SIZE)) * 2 ** (attempt - 1)


def minutes(count):
    """Time of a job: `count` for Llama-2-7B on a GPU, in proportion for other models; an hour at least, at most a day."""
    return min(max(60, int(count * MODEL_SIZE)), 1440)


def texts(section):
    return config[section]["texts"] if section == "evaluation" else [config[section]["text"]]


def text_arguments(section):
    """The texts of a section as the scripts take them: a name, a path, or JSON with a path for each split it reads."""
    return [
        text if isinstance(text, str) else json.dumps({split: text[split] for split in SPLITS_READ[section]})
        for text in texts(section)
    ]


def flags(options):
    """Options as words of a command line: {"batch_size": 4, "bf16": False, "tokens": None} -> --batch-size 4 --no-bf16."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            words += [f"--{flag}", *map(str, value if isinstance(value, list) else [value])]
    return words


def section_flags(section, *left_out):
    """The numbers and choices of a section of the configuration as flags; its texts have a form of their own."""
    return flags({key: value for key, value in config[section].items() if key not in ("text", "texts", *left_out)})


def tier_options(step):
    """What a one-shot run with tiers is told of them: the section `pruning`, and for fixed shares those of the last row."""
    pattern = run_of(step).pattern
    if pattern not in ("three-tier", "hybrid"):
        return []
    shares = {"shares": [row(step).dense, row(step).mid_2_4, row(step).topk]} if pattern == "three-tier" else {}
    return flags({**shares, **config["pruning"]})


def layer_options(step):
    """What a one-shot run is told of sparsity by layer, where its name asks for it."""
    if run_of(step).layers == "uniform":
        return []
    section = config["layer_sparsity"]
    return flags({**section, "layer_sparsity": json.dumps(section["table"]), "table": None})


# What pruning while training takes over from finetuning.
GRADUAL_KEYS = ("sequence_length", "batch_size", "learning_rate", "bf16")


def recovery_flags(step):
    """How a step is finetuned. Who an option belongs to is told it: LoRA's rank must not rerun full finetuning."""
    recovery = dict(config["recovery"])
    lora, distill, one_schedule = (recovery.pop(key) for key in ("lora", "distill", "one_schedule"))
    del recovery["text"]
    if one_schedule and not step.startswith("oneshot/"):
        recovery |= one_schedule_options(step)
    if recovery["method"] == "lora":
        recovery |= {f"lora_{key}": value for key, value in lora.items() if key != "keep_adapter"}
        recovery |= {"output_adapter": f"results/{step}/adapter"} if lora["keep_adapter"] else {}
    if distills(step):
        recovery |= {f"distill_{key}": value for key, value in distill.items()} | {"teacher": model_folder("iter0")}
    return flags(recovery)


def one_schedule_options(step):
    """One schedule over the iterations: the first warms up, the last comes down, and the optimizer goes on in between.

    An iteration asks for nothing of later rows but whether there are any, so that an edited row reruns it and later ones.
    LoRA's adapter is a new one in every iteration, and so is its optimizer.
    """
    options = {}
    carried = config["recovery"]["method"] == "full"
    if row(step) is not SCHEDULE[-1]:
        options["learning_rate_schedule"] = "constant"
        if carried:
            options["output_optimizer"] = f"results/{step}/optimizer.safetensors"
    if carried and any(earlier.epochs for earlier in SCHEDULE[: row(step).iteration - 1]):
        options |= {"warmup_steps": 0, "optimizer": f"results/{previous(step)}/optimizer.safetensors"}
    return options


def distills(step):
    """Whether a step's finetuning learns from the base model too."""
    return config["recovery"]["distill"]["weight"] > 0 and (is_run(step) or row(step).distill)


def measured(step):
    """A step as measure.py takes it: its name, the folder of its model, its tier map or its activations' thresholds."""
    more = [compression_report(step)] if step.startswith("dynamic/") else [tier_map(step)] if step in STEPS else []
    return ["--step", step, model_folder(step), *more]


def figure(name, category="Figures"):
    """A figure as an output that the report shows with its caption."""
    labels = {"figure": name.replace("_", " ")}
    return report(f"results/figures/{name}.svg", caption=f"../report/{name}.rst", category=category, labels=labels)
