# Perplexity and sparsity of every step, the base model's first.


rule evaluate_base:
    input:
        tier_map="results/iter0/tier_map.safetensors",
    output:
        "results/iter0/eval.json",
    log:
        "results/logs/iter0/evaluate_base.log",
    benchmark:
        "results/benchmarks/iter0/evaluate_base.jsonl"
    conda:
        "../envs/evaluate.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "evaluate_base.py",
        code=code_hash("evaluate_base.py"),
        folder=folder_of("tier_map"),
        name=as_written(MODEL_NAME),
        texts=text_arguments("evaluation"),
        texts_content=text_fingerprint("evaluation"),
        options=section_flags("evaluation"),
        device=config["device"],
        trust=TRUST,
    message:
        "iter0: evaluating the base model"
    shell:
        "python {params.script:q} --model {params.folder:q} --masks {input.tier_map:q} --model-name {params.name:q}"
        " --text {params.texts:q} {params.options:q} --device {params.device:q} {params.trust:q} --output {output:q}"
        " --log {log:q}"


rule evaluate:
    input:
        pruned="results/{step}/pruned_model/model.safetensors.index.json",
        refitted=branch(is_refitted, then="results/{step}/refitted_model/model.safetensors.index.json"),
        reconstructed=branch(is_reconstructed, then="results/{step}/reconstructed_model/model.safetensors.index.json"),
        finetuned="results/{step}/finetuned_model/model.safetensors.index.json",
        masks=masks_of,
        training="results/{step}/training.json",
        base="results/iter0/eval.json",
    output:
        "results/{step}/eval.json",
    log:
        "results/logs/{step}/evaluate.log",
    benchmark:
        "results/benchmarks/{step}/evaluate.jsonl"
    conda:
        "../envs/evaluate.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "evaluate.py",
        code=code_hash("evaluate.py"),
        pruned=subpath(input.pruned, parent=True),
        mended=mended_flags,
        finetuned=subpath(input.finetuned, parent=True),
        name=as_written(MODEL_NAME),
        texts=text_arguments("evaluation"),
        texts_content=text_fingerprint("evaluation"),
        options=section_flags("evaluation"),
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: evaluating the pruned and the finetuned model"
    shell:
        "python {params.script:q} --pruned-model {params.pruned:q} {params.mended:q}"
        " --finetuned-model {params.finetuned:q} --masks {input.masks:q} --training {input.training:q}"
        " --base-eval {input.base:q} --step {wildcards.step:q} --model-name {params.name:q}"
        " --text {params.texts:q} {params.options:q} --device {params.device:q} {params.trust:q} --output {output:q}"
        " --log {log:q}"
