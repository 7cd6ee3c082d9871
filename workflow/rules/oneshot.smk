# Pruning in one shot by any method and pattern: a run is a step named after what it does, such as oneshot/wanda-2of4.
# Finetuning and evaluation are those of every step; the report of a run takes the place of a tier map.


rule prune_oneshot:
    input:
        model=model_ready("iter0"),
    output:
        model="results/oneshot/{run}/pruned_model/model.safetensors.index.json",
        report="results/oneshot/{run}/pruning.json",
    log:
        "results/logs/oneshot/{run}/prune_oneshot.log",
    benchmark:
        "results/benchmarks/oneshot/{run}/prune_oneshot.jsonl"
    wildcard_constraints:
        run=r"(?!three-tier/)[^/]+",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "prune_oneshot.py",
        code=code_hash("prune_oneshot.py"),
        # The script finds the method by its name, so its code is not among what the script imports.
        method=lambda wildcards: code_hash(f"stepdown/prune/methods/{run_of(wildcards.run).method}.py"),
        folder=model_folder("iter0"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        tiers=lambda wildcards: tier_options(f"oneshot/{wildcards.run}"),
        layers=lambda wildcards: layer_options(f"oneshot/{wildcards.run}"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        pruned=subpath(output.model, parent=True),
    message:
        "oneshot/{wildcards.run}: pruning"
    shell:
        "python {params.script} --run {wildcards.run} --model {params.folder} --text {params.text:q} {params.options}"
        " {params.tiers} {params.layers:q} --seed {params.seed} --device {params.device} {params.trust}"
        " --output-model {params.pruned} --output-report {output.report} --log {log}"
