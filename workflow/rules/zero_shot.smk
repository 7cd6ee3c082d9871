# Tasks of lm-eval on every finished model; nothing where the configuration names no tasks.


rule zero_shot:
    input:
        model=model_for_tasks,
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
        folder=folder_of("model"),
        tasks=as_written(config["zero_shot"]["tasks"]),
        task_files=fingerprints.folder_fingerprint(config["zero_shot"]["task_folder"]),
        options=as_written(flags({**config["zero_shot"], "tasks": None})),
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: zero-shot tasks {params.tasks}"
    shell:
        "python {params.script:q} --model {params.folder:q} --step {wildcards.step:q} --tasks {params.tasks:q}"
        " {params.options:q} --device {params.device:q} {params.trust:q} --output {output:q} --log {log:q}"
