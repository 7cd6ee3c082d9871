# Which step starts from which, and what the rules ask for by the name of a step.


def row(step):
    """The row of the schedule that a step follows."""
    if not SCHEDULE:
        name = step.removeprefix("oneshot/")
        leave = f", or leave {name} out of oneshot" if name in config["oneshot"] else ""
        raise SystemExit(
            f"error: results/{step}: config key schedule is null; name a schedule, whose rows make its tiers{leave}"
        )
    if step.startswith("oneshot/"):
        return one_shot(SCHEDULE)
    number = int(step.removeprefix("iter"))
    if number > len(SCHEDULE):
        raise SystemExit(
            f"error: results/{step}: {config['schedule']} has {len(SCHEDULE)} rows; add a row or ask for less"
        )
    return SCHEDULE[number - 1]


def of_row(column):
    """A column of the schedule, as a parameter of the rules that use it and of no other."""
    return lambda wildcards: getattr(row(wildcards.step), column)


def base_of(step):
    """The base model of a step. Channels are sorted so that weak ones share blocks, and neighbours that are alike are a
    burden to 2:4: a run whose pattern has no blocks starts from the model as it came."""
    if not is_run(step):
        return BASE
    kind, name = step.split("/")
    with one_line():
        run = (parse_gradual if kind == "gradual" else parse_run)(name, method_names())
    return BASE if run.has_blocks else IMPORTED


def base_model_of(wildcards):
    return model_ready(base_of(wildcards.step))


def base_of_run(kind):
    """The base model that a rule for all runs of a kind, oneshot or gradual, prunes."""
    return lambda wildcards: model_ready(base_of(f"{kind}/{wildcards.run}"))


def previous(step):
    """The step whose finetuned model this one starts from; a one-shot run starts from the base model."""
    return base_of(step) if is_run(step) else f"iter{row(step).iteration - 1}"


def model_before(wildcards):
    return model_ready(previous(wildcards.step))


def tier_map_before(wildcards):
    return tier_map(previous(wildcards.step))


def of_statistics(name):
    """A file of the step whose calibration and scores serve this one: iter1 for a one-shot run, of the same model."""
    return lambda wildcards: f"results/iter{row(wildcards.step).iteration}/{name}.safetensors"


def finished_model(wildcards):
    return model_ready(wildcards.step)


def model_for_tasks(wildcards):
    """The model that tasks are measured on; refused before anything runs where there are none."""
    if not config["zero_shot"]["tasks"]:
        raise SystemExit("error: config key zero_shot.tasks: found []; name tasks such as [arc_easy]")
    return finished_model(wildcards)


def model_to_pack(wildcards):
    """The model of a step; blocks of a size that is not packed are refused before anything runs."""
    with one_line():
        check_packable(config["pruning"]["block_size"])
    return finished_model(wildcards)


def source_model(wildcards):
    return model_ready(wildcards.source)


def exported_model(wildcards):
    """The model of a step; what is not written to GGUF, a sliced model or a family, is refused before anything runs."""
    if wildcards.source.startswith("structured/slicegpt-"):
        raise SystemExit(f"error: {wildcards.source}: a GGUF file has no names for a sliced model; export another step")
    if folder := local_model(MODEL):
        with one_line():
            gguf_architecture(folder)
    return source_model(wildcards)


def compressed_model(wildcards):
    return model_ready(wildcards.compressed)


def compression_report_of(wildcards):
    return compression_report(wildcards.compressed)


def masks_of(wildcards):
    return masks(wildcards.step)


def is_refitted(wildcards):
    """Whether a step's pruned model is refitted before it is finetuned; a gradual run has trained for its mask."""
    step = wildcards.step
    return config["oneshot_refit"] and not step.startswith("gradual/") if is_run(step) else config["refit"]


def is_reconstructed(wildcards):
    """Whether a step's refitted model is reconstructed before it is finetuned."""
    return config["reconstruction"]["enabled"] and is_refitted(wildcards)


def model_to_finetune(wildcards):
    """The last model of a step before finetuning: reconstructed, refitted or just pruned."""
    done = "reconstructed" if is_reconstructed(wildcards) else "refitted" if is_refitted(wildcards) else "pruned"
    return f"results/{wildcards.step}/{done}_model/model.safetensors.index.json"


def distills(wildcards):
    """Whether a step's finetuning learns from the base model too."""
    step = wildcards.step
    return config["recovery"]["distill"]["weight"] > 0 and epochs(wildcards) > 0 and (is_run(step) or row(step).distill)


def epochs(wildcards):
    """Epochs of finetuning after a step."""
    return config["oneshot_epochs"] if is_run(wildcards.step) else row(wildcards.step).epochs


def run_of(wildcards):
    """What the name of a one-shot run asks for."""
    with one_line():
        return one_shot_run(wildcards.run)


def gradual_run(wildcards):
    """The name of a run whose masks are chosen while the model trains, once it is known to ask for something."""
    with one_line():
        return parse_gradual(wildcards.run, method_names()).name


def compression(form):
    """The name in a step of a form such as "quantised/{run}/{source}", once it is known to ask for something."""

    def name(wildcards):
        with one_line():
            check_step(form.format(**wildcards), local_model(MODEL), config["structured"]["round_to"])
        return wildcards.run

    return name
