# Pruning in one shot by any method and pattern: a run is a step named after what it does, such as oneshot/wanda-2of4.
# Finetuning and evaluation are those of every step; the report of a run takes the place of a tier map.


rule prune_oneshot:
    input:
        model=base_of_run("oneshot"),
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
        method=method_hash,
        folder=folder_of("model"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        tiers=tier_options,
        layers=layer_options,
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        pruned=subpath(output.model, parent=True),
    message:
        "oneshot/{wildcards.run}: pruning"
    shell:
        "python {params.script:q} --run {wildcards.run:q} --model {params.folder:q}"
        " --text {params.text:q} {params.options:q} {params.tiers:q} {params.layers:q} --seed {params.seed:q}"
        " --device {params.device:q} {params.trust:q} --output-model {params.pruned:q}"
        " --output-report {output.report:q} --log {log:q}"
