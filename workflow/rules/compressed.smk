# What is not pruning weight by weight: smaller models, whole numbers, sparse activations. A step is named after what it
# does; the last two are done to the finished model of another step, quantised/NAME/STEP and dynamic/NAME/STEP.


rule prune_structured:
    input:
        model=model_ready("iter0"),
    output:
        model="results/structured/{run}/model/model.safetensors.index.json",
        report="results/structured/{run}/pruning.json",
    log:
        "results/logs/structured/{run}/prune_structured.log",
    benchmark:
        "results/benchmarks/structured/{run}/prune_structured.jsonl"
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "prune_structured.py",
        code=code_hash("prune_structured.py"),
        run=compression("structured/{run}"),
        folder=folder_of("model"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        structured=flags(config["structured"]),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        smaller=subpath(output.model, parent=True),
    message:
        "structured/{wildcards.run}: making the model smaller"
    shell:
        "python {params.script:q} --run {params.run:q} --model {params.folder:q}"
        " --text {params.text:q} {params.options:q} {params.structured:q} --seed {params.seed:q}"
        " --device {params.device:q} {params.trust:q} --output-model {params.smaller:q}"
        " --output-report {output.report:q} --log {log:q}"


rule quantise:
    input:
        model=source_model,
    output:
        model="results/quantised/{run}/{source}/model/model.safetensors.index.json",
        report="results/quantised/{run}/{source}/quantisation.json",
    log:
        "results/logs/quantised/{run}/{source}/quantise.log",
    benchmark:
        "results/benchmarks/quantised/{run}/{source}/quantise.jsonl"
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "quantise.py",
        code=code_hash("quantise.py"),
        run=compression("quantised/{run}/{source}"),
        folder=folder_of("model"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        quantised=subpath(output.model, parent=True),
    message:
        "quantised/{wildcards.run}/{wildcards.source}: quantising"
    shell:
        "python {params.script:q} --run {params.run:q} --model {params.folder:q}"
        " --text {params.text:q} {params.options:q} --seed {params.seed:q} --device {params.device:q} {params.trust:q}"
        " --output-model {params.quantised:q} --output-report {output.report:q} --log {log:q}"


rule calibrate_thresholds:
    input:
        model=source_model,
    output:
        "results/dynamic/{run}/{source}/thresholds.json",
    log:
        "results/logs/dynamic/{run}/{source}/calibrate_thresholds.log",
    benchmark:
        "results/benchmarks/dynamic/{run}/{source}/calibrate_thresholds.jsonl"
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "calibrate_thresholds.py",
        code=code_hash("calibrate_thresholds.py"),
        run=compression("dynamic/{run}/{source}"),
        folder=folder_of("model"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "dynamic/{wildcards.run}/{wildcards.source}: thresholds of its activations"
    shell:
        "python {params.script:q} --run {params.run:q} --model {params.folder:q}"
        " --text {params.text:q} {params.options:q} --seed {params.seed:q} --device {params.device:q} {params.trust:q}"
        " --output {output:q} --log {log:q}"


rule evaluate_compressed:
    input:
        model=compressed_model,
        report=compression_report_of,
        base_model=model_ready("iter0"),
        base="results/iter0/eval.json",
    output:
        "results/{compressed}/eval.json",
    log:
        "results/logs/{compressed}/evaluate_compressed.log",
    benchmark:
        "results/benchmarks/{compressed}/evaluate_compressed.jsonl"
    conda:
        "../envs/evaluate.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "evaluate_compressed.py",
        code=code_hash("evaluate_compressed.py"),
        folder=folder_of("model"),
        dense=folder_of("base_model"),
        name=as_written(MODEL_NAME),
        texts=text_arguments("evaluation"),
        texts_content=text_fingerprint("evaluation"),
        options=section_flags("evaluation"),
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.compressed}: evaluating"
    shell:
        "python {params.script:q} --model {params.folder:q} --base-model {params.dense:q} --masks {input.report:q}"
        " --base-eval {input.base:q} --step {wildcards.compressed:q} --model-name {params.name:q}"
        " --text {params.texts:q} {params.options:q} --device {params.device:q} {params.trust:q} --output {output:q}"
        " --log {log:q}"


# All in one job, so that the times compare; on a machine of its own where it has all threads.
rule measure:
    input:
        models=[model_ready(step) for step in ALL_STEPS],
        thresholds=[compression_report(step) for step in ALL_STEPS if step.startswith("dynamic/")],
        packed=collect("results/{step}/packed.json", step=PACKED),
    output:
        "results/measurements.json",
    log:
        "results/logs/measure.log",
    benchmark:
        "results/benchmarks/measure.jsonl"
    conda:
        "../envs/evaluate.yaml"
    # All there are, so that nothing runs beside it; a job on a cluster has its CPUs to itself.
    threads: workflow.resource_settings.cores or THREADS
    resources:
        mem_mb=memory(64000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "measure.py",
        code=code_hash("measure.py"),
        # Compiled where packed models are measured: not among what the script imports.
        kernels=fingerprints.folder_fingerprint(SCRIPTS / "stepdown/packed/kernels" if PACKED else None),
        steps=measured,
        options=flags({**config["speed"], "measured": None, "packed": None}),
        device=config["device"],
        trust=TRUST,
    message:
        "the size and the speed of all models"
    shell:
        "python {params.script:q} {params.steps:q} {params.options:q} --device {params.device:q} {params.trust:q}"
        " --output {output:q} --log {log:q}"


# Masks are chosen while the model trains; finetuning and evaluation are those of a one-shot run.
rule prune_gradually:
    input:
        model=base_of_run("gradual"),
    output:
        model="results/gradual/{run}/pruned_model/model.safetensors.index.json",
        report="results/gradual/{run}/pruning.json",
    log:
        "results/logs/gradual/{run}/prune_gradually.log",
    benchmark:
        "results/benchmarks/gradual/{run}/prune_gradually.jsonl"
    conda:
        "../envs/finetune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(64000),
        runtime=minutes(1440),
        gpu=GPUS,
    params:
        script=SCRIPTS / "prune_gradually.py",
        code=code_hash("prune_gradually.py"),
        run=gradual_run,
        folder=folder_of("model"),
        text=text_arguments("recovery"),
        text_content=text_fingerprint("recovery"),
        options=flags({key: config["recovery"][key] for key in GRADUAL_KEYS}),
        gradual=flags({**config["gradual"], "runs": None}),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        pruned=subpath(output.model, parent=True),
    message:
        "gradual/{wildcards.run}: pruning while the model trains"
    shell:
        "python {params.script:q} --run {params.run:q} --model {params.folder:q}"
        " --text {params.text:q} {params.options:q} {params.gradual:q} --seed {params.seed:q}"
        " --device {params.device:q} {params.trust:q} --output-model {params.pruned:q}"
        " --output-report {output.report:q} --log {log:q}"
