# The checked configuration, the schedule, and all steps there are.

import os
import sys
from contextlib import contextmanager

import yaml

SCRIPTS = Path(os.path.relpath(PROJECT / "workflow/scripts"))
# First, whatever else is installed under the package's name; and not for longer, since the scripts beside it have names
# that others have too.
sys.path.insert(0, os.path.abspath(SCRIPTS))
from stepdown.errors import UserError
from stepdown.plan import command_lines, fingerprints
from stepdown.plan.command_lines import flags
from stepdown.plan.compressions import check_step
from stepdown.plan.gguf_families import gguf_architecture
from stepdown.plan.gguf_header import is_gguf, read_gguf_header
from stepdown.plan.preflight import (
    SPLITS_READ,
    check_inputs,
    check_links,
    check_packable,
    check_training_memory,
    check_writable,
    complete_config,
    local_model,
    local_files,
)
from stepdown.plan.runs import check_selection, parse_gradual, parse_run
from stepdown.plan.schedule import one_shot, read_schedule
from stepdown.plan.steps import BASE, UNSORTED, compression_report, is_run, masks, model_of, model_ready, tier_map
from stepdown.prune.methods import method_names

sys.path.remove(os.path.abspath(SCRIPTS))

IS_MODULE = not workflow.modifier.is_main_snakefile()
# A workflow that this is a module of may have results elsewhere.
RESULTS = Path(workflow.modifier.path_modifier.replace_prefix("results/iter0")).parent


@contextmanager
def one_line():
    """A mistake of the user's ends the run with its line: the one way out of a Snakefile that prints nothing else."""
    try:
        yield
    except (UserError, OSError) as error:
        raise SystemExit(f"error: {error}")


def found(path):
    """A path as it is reached from here: what is not here but comes with the project is taken from there."""
    bundled = PROJECT / path
    return os.path.relpath(bundled) if path and not os.path.exists(path) and bundled.exists() else path


def one_shot_run(name):
    """What the name of a one-shot run asks for, once it is known to go with the configuration."""
    run = parse_run(name, method_names())
    check_selection(run, config["pruning"]["selection"])
    return run


with one_line():
    if set("{}") & set(str(PROJECT)):
        raise UserError(f"{PROJECT}: Snakemake takes the braces in this path for wildcards; rename the folder")
    # Another dictionary: in a module, `config` may be that of the workflow around it.
    config = complete_config(config, yaml.safe_load((PROJECT / "workflow/schemas/config.schema.yaml").read_text()))
    MODEL = found(config["model"])
    SCHEDULE = read_schedule(found(config["schedule"])) if config["schedule"] else []
    check_inputs(config | {"model": MODEL})
    check_writable(Path(), Path(".snakemake"), RESULTS)
    # Where the base model comes to, as it was given: in its own folder where its channels are sorted before it is used.
    IMPORTED = UNSORTED if config["sort_channels"] else BASE
    check_links(RESULTS / IMPORTED)
    trains = config["oneshot_epochs"] or any(row.epochs for row in SCHEDULE)
    if trains and config["device"] != "cpu" and local_model(MODEL):
        check_training_memory(config["recovery"], local_model(MODEL))
    # Steps without a tier map, each pruned by the method and pattern of its name.
    RUNS = {f"oneshot/{name}": one_shot_run(name) for name in config["oneshot"] if name != "three-tier"}
    # Steps that are no pruning of weights one by one: smaller models, whole numbers, sparse activations.
    for step in config["compressions"]:
        check_step(step, local_model(MODEL), config["structured"]["round_to"])
    RUNS |= {f"gradual/{name}": parse_gradual(name, method_names()) for name in config["gradual"]["runs"]}

STEPS = [f"iter{row.iteration}" for row in SCHEDULE]
STEPS += [f"oneshot/{name}" for name in config["oneshot"] if name == "three-tier"]

# Of the chain and what is like it, by tiers; and of every run there is.
EVALS = collect("results/{step}/eval.json", step=["iter0", *STEPS])
ALL_STEPS = ["iter0", *STEPS, *RUNS, *config["compressions"]]
ALL_EVALS = collect("results/{step}/eval.json", step=ALL_STEPS)
ZERO_SHOT = collect(
    "results/{step}/zero_shot.json", step=["iter0", *STEPS, *RUNS] if config["zero_shot"]["tasks"] else []
)
MEASUREMENTS = ["results/measurements.json"] if config["speed"]["measured"] else []
PACKED = [f"iter{len(SCHEDULE)}/packed/{values}" for values in config["speed"]["packed"]]
TRAINING = collect("results/{step}/training.json", step=STEPS)
TIER_MAPS = collect("results/{step}/tier_map.safetensors", step=STEPS)

# A step asks for the step before it: Python's default of 1000 frames ends at 96 iterations.
sys.setrecursionlimit(max(sys.getrecursionlimit(), 1000 + 20 * len(SCHEDULE)))

# `python` is this interpreter where no conda environment is active, and that environment's where one is;
# what stands in ~/.local is part of neither.
os.environ.update(
    PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]), PYTHONNOUSERSITE="1"
)
# Threads that wait by spinning make everything several times slower as soon as the machine does anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
