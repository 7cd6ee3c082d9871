# If there is a target, the shares of the tiers after the last row follow from it and from what the base model's blocks
# cost.


rule choose_shares:
    input:
        model=model_ready("iter0"),
        calibration="results/iter1/calibration.safetensors",
        tier_map="results/iter0/tier_map.safetensors",
    output:
        "results/target_shares.json",
    log:
        "results/logs/choose_shares.log",
    benchmark:
        "results/benchmarks/choose_shares.jsonl"
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
        gpu=GPUS,
    params:
        script=SCRIPTS / "choose_shares.py",
        code=code_hash("choose_shares.py"),
        folder=folder_of("model"),
        target=flags(config["pruning"]["target"]),
        selection=config["pruning"]["selection"],
        device=config["device"],
    message:
        "the shares of the tiers that meet the target"
    shell:
        "python {params.script:q} --model {params.folder:q} --calibration {input.calibration:q}"
        " --tier-map {input.tier_map:q} {params.target:q} --selection {params.selection:q} --device {params.device:q}"
        " --output {output:q} --log {log:q}"
