# A step's finished model as llama.cpp's, made when asked for:
#   snakemake -j1 results/iter5/model.gguf results/iter5/model-q8_0.gguf


rule gguf:
    input:
        model=exported_model,
    output:
        "results/{source}/model{suffix}.gguf",
    log:
        "results/logs/{source}/gguf{suffix}.log",
    benchmark:
        "results/benchmarks/{source}/gguf{suffix}.jsonl"
    wildcard_constraints:
        suffix="|-q8_0",
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "gguf_file.py",
        code=code_hash("gguf_file.py"),
        folder=folder_of("model"),
        values=lambda wildcards: wildcards.suffix.removeprefix("-") or "bf16",
    message:
        "{wildcards.source}: a GGUF file"
    shell:
        "python {params.script:q} --model {params.folder:q} --values {params.values:q} --output {output:q} --log {log:q}"
