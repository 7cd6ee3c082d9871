# A step's finetuned model in the packed three-tier format, made when asked for:
#   snakemake -j1 results/iter5/packed/bf16/packed.json results/iter5/packed/int8/packed.json


rule pack:
    input:
        model=model_to_pack,
        tier_map="results/{step}/tier_map.safetensors",
    output:
        "results/{step}/packed/bf16/packed.json",
    log:
        "results/logs/{step}/pack.log",
    benchmark:
        "results/benchmarks/{step}/pack.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/three-tier",
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "pack.py",
        code=code_hash("pack.py"),
        finetuned=subpath(input.model, parent=True),
        folder=subpath(output[0], parent=True),
    message:
        "{wildcards.step}: the packed model"
    shell:
        "python {params.script:q} --model {params.finetuned:q} --tier-map {input.tier_map:q} --output {params.folder:q}"
        " --log {log:q}"


rule pack_integers:
    input:
        model=model_to_pack,
        tier_map="results/{step}/tier_map.safetensors",
    output:
        "results/{step}/packed/{values}/packed.json",
    log:
        "results/logs/{step}/pack_integers_{values}.log",
    benchmark:
        "results/benchmarks/{step}/pack_integers_{values}.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/three-tier",
        values="int8|int4",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "pack_integers.py",
        code=code_hash("pack_integers.py"),
        finetuned=subpath(input.model, parent=True),
        folder=subpath(output[0], parent=True),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: the packed model, {wildcards.values}"
    shell:
        "python {params.script:q} --model {params.finetuned:q} --tier-map {input.tier_map:q} --values {wildcards.values:q}"
        " --text {params.text:q} {params.options:q} --seed {params.seed:q} --device {params.device:q} {params.trust:q}"
        " --output {params.folder:q} --log {log:q}"
