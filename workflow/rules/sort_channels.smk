# If asked for, the channels of the base model are sorted before anything else, and every step starts from what this
# makes, but for the runs whose pattern has no blocks: see `base_of`.


# The tier map stands for the rest, as it does where base_model makes it. Beside an output that were missing, Snakemake
# would not see that another rule made it.
rule sort_channels:
    input:
        tier_map=f"results/{IMPORTED}/tier_map.safetensors",
    output:
        tier_map="results/iter0/tier_map.safetensors",
    log:
        "results/logs/iter0/sort_channels.log",
    benchmark:
        "results/benchmarks/iter0/sort_channels.jsonl"
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(16000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "sort_channels.py",
        code=code_hash("sort_channels.py"),
        folder=folder_of("tier_map"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        cost=config["pruning"]["cost"],
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
        base=subpath(output.tier_map, parent=True),
    message:
        "iter0: sorting the channels of the base model"
    shell:
        "python {params.script:q} --model {params.folder:q} --tier-map {input.tier_map:q}"
        " --text {params.text:q} {params.options:q} --cost {params.cost:q} --seed {params.seed:q}"
        " --device {params.device:q} {params.trust:q} --output-model {params.base:q}/model"
        " --output-permutation {params.base:q}/permutation.safetensors --output-tier-map {output.tier_map:q} --log {log:q}"
