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
        folder=model_folder("iter0"),
        name=MODEL_NAME,
        texts=text_arguments("evaluation"),
        texts_content=text_fingerprint("evaluation"),
        options=section_flags("evaluation"),
        device=config["device"],
        trust=TRUST,
    message:
        "iter0: evaluating the base model"
    shell:
        "python {params.script} --model {params.folder} --masks {input.tier_map} --model-name {params.name:q}"
        " --text {params.texts:q} {params.options} --device {params.device} {params.trust} --output {output} --log {log}"


rule evaluate:
    input:
        pruned="results/{step}/pruned_model/model.safetensors.index.json",
        refitted=lambda wildcards: (
            f"{start_folder(wildcards.step)}/model.safetensors.index.json" if is_refitted(wildcards.step) else []
        ),
        finetuned="results/{step}/finetuned_model/model.safetensors.index.json",
        masks=lambda wildcards: masks(wildcards.step),
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
        refitted=lambda wildcards: (
            flags({"refitted_model": start_folder(wildcards.step)}) if is_refitted(wildcards.step) else []
        ),
        finetuned=subpath(input.finetuned, parent=True),
        name=MODEL_NAME,
        texts=text_arguments("evaluation"),
        texts_content=text_fingerprint("evaluation"),
        options=section_flags("evaluation"),
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: evaluating the pruned and the finetuned model"
    shell:
        "python {params.script} --pruned-model {params.pruned} {params.refitted} --finetuned-model {params.finetuned}"
        " --masks {input.masks} --training {input.training} --base-eval {input.base}"
        " --step {wildcards.step} --model-name {params.name:q} --text {params.texts:q} {params.options}"
        " --device {params.device} {params.trust} --output {output} --log {log}"
