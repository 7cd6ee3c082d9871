# Tasks of lm-eval on every finished model; nothing where the configuration names no tasks.


rule zero_shot:
    input:
        model=lambda wildcards: model_ready(wildcards.step),
    output:
        "results/{step}/zero_shot.json",
    log:
        "results/logs/{step}/zero_shot.log",
    benchmark:
        "results/benchmarks/{step}/zero_shot.jsonl"
    wildcard_constraints:
        step=r"iter\d+|(oneshot|gradual)/[^/]+",
    conda:
        "../envs/zero_shot.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(64000),
        runtime=minutes(480),
        gpu=GPUS,
    params:
        script=SCRIPTS / "zero_shot.py",
        code=code_hash("zero_shot.py"),
        folder=lambda wildcards: model_folder(wildcards.step),
        tasks=config["zero_shot"]["tasks"],
        task_files=task_fingerprint(),
        options=flags({**config["zero_shot"], "tasks": None}),
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: zero-shot tasks {params.tasks}"
    shell:
        "python {params.script} --model {params.folder} --step {wildcards.step} --tasks {params.tasks:q}"
        " {params.options:q} --device {params.device} {params.trust} --output {output} --log {log}"
