# What the scripts are told of the configuration.
# Names and texts of the user's own are handed over as functions: in those Snakemake takes no braces for wildcards.

import json

# In results a model is called what the configuration calls it, but where on this machine it lies is nobody's business.
MODEL_NAME = Path(config["model"]).name if os.path.isabs(config["model"]) else config["model"]
TRUST = ["--trust-remote-code"] if config["trust_remote_code"] else []
# What pruning while training takes over from finetuning.
GRADUAL_KEYS = ("sequence_length", "batch_size", "learning_rate", "bf16")


def as_written(value):
    return lambda wildcards: value


def texts(section):
    return config[section]["texts"] if section == "evaluation" else [config[section]["text"]]


def text_arguments(section):
    return as_written(command_lines.text_words(texts(section), SPLITS_READ[section]))


def section_flags(section, *left_out):
    """The numbers and choices of a section of the configuration as flags; its texts have a form of their own."""
    return flags({key: value for key, value in config[section].items() if key not in ("text", "texts", *left_out)})


def folder_of(name):
    """The folder of the model that the input called `name` stands for."""
    return lambda wildcards, input: model_of(input[name])


def tier_options(wildcards):
    """What a one-shot run with tiers is told of them: the section `pruning`, and fixed shares as of the last row."""
    pattern = run_of(wildcards).pattern
    if pattern not in ("three-tier", "hybrid"):
        return []
    last = row(f"oneshot/{wildcards.run}") if pattern == "three-tier" else None
    shares = {"shares": [last.dense, last.mid_2_4, last.topk]} if last else {}
    # A run goes by its own method, in every matrix.
    return flags({**shares, **config["pruning"], "cost": None, "shared_over": None, "target": None})


def target_flags(wildcards, input):
    """Where a step's shares are, where a target takes the place of the schedule's last row."""
    return flags({"target": str(input.target) if input.target else None})


def last_row_flags(wildcards):
    """What the shares of a target are those of, and the ones of every row in proportion."""
    if not config["pruning"]["target"]:
        return []
    last = one_shot(SCHEDULE)
    return flags({"last": [last.dense, last.mid_2_4, last.topk]})


def layer_options(wildcards):
    """What a one-shot run is told of sparsity by layer, where its name asks for it."""
    if run_of(wildcards).layers == "uniform":
        return []
    section = config["layer_sparsity"]
    if run_of(wildcards).layers == "table" and not section["table"]:
        told = f"name matrices, or ask for {wildcards.run.removesuffix('-table')} without -table"
        raise SystemExit(f"error: config key layer_sparsity.table: found {{}}; {told}")
    return flags({**section, "layer_sparsity": json.dumps(section["table"]), "table": None})


def swaps_flags(wildcards):
    """Whether blocks of tiers choose anew what they keep; a run by method and pattern has no such blocks."""
    return [] if is_run(wildcards.step) else flags({"swaps": config["swaps"]})


def reconstruction_flags(wildcards):
    """How a step is reconstructed: by the text of the calibration, but more of it."""
    return flags({**config["calibration"], **config["reconstruction"], "text": None, "enabled": None})


def mended_flags(wildcards, input):
    """The models between pruning and finetuning, where there are any."""
    found = {"refitted_model": input.refitted, "reconstructed_model": input.reconstructed}
    return flags({name: model_of(index) for name, index in found.items() if index})


def results_folder(wildcards, output):
    """The folder that all steps are in, `results` but in a module that has a prefix."""
    return str(Path(output.training).parents[1 + wildcards.step.count("/")])


def recovery_flags(wildcards, input, output):
    """How a step is finetuned."""
    teacher = model_of(input.teacher) if input.teacher else None
    return recovery_words(wildcards, results_folder(wildcards, output), teacher)


def recovery_settings(wildcards):
    """The same with stand-ins for files: what is made of inputs or outputs is no reason to Snakemake to run anew."""
    return recovery_words(wildcards, "results", "teacher" if distills(wildcards) else None)


def recovery_words(wildcards, results, teacher):
    """results: the folder of all steps; teacher: the model to learn from as well, if any."""
    step, recovery = wildcards.step, config["recovery"]
    one_schedule = {}
    if recovery["one_schedule"] and step.startswith("iter"):
        one_schedule = command_lines.one_schedule_options(SCHEDULE, row(step), recovery["method"], results)
    if epochs(wildcards) == 0:
        return flags(command_lines.passing_on_options(recovery, one_schedule))
    return flags(command_lines.recovery_options(recovery, f"{results}/{step}", teacher, one_schedule))


def measured(wildcards, input):
    """Every step as measure.py takes it: its name, the folder of its model, its tier map or its thresholds."""
    words, thresholds = [], iter(input.thresholds)
    for step, ready in zip(ALL_STEPS, input.models):
        folder = Path(model_of(ready))
        words += ["--step", step, str(folder)]
        if step.startswith("dynamic/"):
            words.append(next(thresholds))
        elif step in STEPS:
            words.append(str(folder.parent / "tier_map.safetensors"))
    for step, index in zip(PACKED, input.packed):
        words += ["--step", step, str(Path(index).parent)]
    return words
