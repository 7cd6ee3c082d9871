# A step's finetuned model in the packed three-tier format, made when asked for:
#   snakemake -j1 results/iter5/packed/packed.json


rule pack:
    input:
        model="results/{step}/finetuned_model/model.safetensors.index.json",
        tier_map="results/{step}/tier_map.safetensors",
    output:
        "results/{step}/packed/packed.json",
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
