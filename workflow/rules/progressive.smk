# One step: calibrate, score, degrade twice, refit, finetune. The same rules make the iterations and the one-shot run.


rule base_model:
    output:
        tier_map="results/iter0/tier_map.safetensors",
    log:
        "results/logs/iter0/base_model.log",
    benchmark:
        "results/benchmarks/iter0/base_model.jsonl"
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(4000),
        runtime=minutes(240),
    params:
        script=SCRIPTS / "base_model.py",
        code=code_hash("base_model.py"),
        model=config["model"],
        model_content=model_fingerprint(),
        model_options=flags({"revision": config["revision"]}) + TRUST,
        block=flags({key: config["pruning"][key] for key in ("block_size", "k")}),
        folder=model_folder("iter0"),
    message:
        "iter0: the base model, {params.model}"
    shell:
        "python {params.script} --model {params.model:q} {params.model_options:q} {params.block}"
        " --output-model {params.folder} --output-tier-map {output.tier_map} --log {log}"


rule calibrate:
    input:
        model=lambda wildcards: model_ready(previous(wildcards.step)),
    output:
        "results/{step}/calibration.safetensors",
    log:
        "results/logs/{step}/calibrate.log",
    benchmark:
        "results/benchmarks/{step}/calibrate.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(16000),
        runtime=minutes(120),
        gpu=GPUS,
    params:
        script=SCRIPTS / "calibrate.py",
        code=code_hash("calibrate.py"),
        folder=lambda wildcards: model_folder(previous(wildcards.step)),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: what the inputs of every matrix are like"
    shell:
        "python {params.script} --model {params.folder} --text {params.text:q} {params.options}"
        " --seed {params.seed} --device {params.device} {params.trust} --output {output} --log {log}"


rule score:
    input:
        model=lambda wildcards: model_ready(previous(wildcards.step)),
        calibration="results/{step}/calibration.safetensors",
        tier_map=lambda wildcards: tier_map(previous(wildcards.step)),
    output:
        "results/{step}/scores.safetensors",
    log:
        "results/logs/{step}/score.log",
    benchmark:
        "results/benchmarks/{step}/score.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "score.py",
        code=code_hash("score.py"),
        folder=lambda wildcards: model_folder(previous(wildcards.step)),
    message:
        "{wildcards.step}: what every block is worth"
    shell:
        "python {params.script} --model {params.folder} --calibration {input.calibration}"
        " --tier-map {input.tier_map} --output {output} --log {log}"


rule degrade_dense_to_2_4:
    input:
        scores=lambda wildcards: f"results/{statistics(wildcards.step)}/scores.safetensors",
        tier_map=lambda wildcards: tier_map(previous(wildcards.step)),
    output:
        "results/{step}/tier_map_2_4.safetensors",
    log:
        "results/logs/{step}/degrade_dense_to_2_4.log",
    benchmark:
        "results/benchmarks/{step}/degrade_dense_to_2_4.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/three-tier",
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "degrade_dense_to_2_4.py",
        code=code_hash("degrade_dense_to_2_4.py"),
        iteration=lambda wildcards: row(wildcards.step).iteration,
        dense=lambda wildcards: row(wildcards.step).dense,
        mid_2_4=lambda wildcards: row(wildcards.step).mid_2_4,
        topk=lambda wildcards: row(wildcards.step).topk,
    message:
        "{wildcards.step}: dense blocks down to 2:4, until {params.dense} is dense"
    shell:
        "python {params.script} --scores {input.scores} --tier-map {input.tier_map} --iteration {params.iteration}"
        " --dense {params.dense} --mid-2-4 {params.mid_2_4} --topk {params.topk} --output {output} --log {log}"


rule degrade_2_4_to_topk:
    input:
        model=lambda wildcards: model_ready(previous(wildcards.step)),
        calibration=lambda wildcards: f"results/{statistics(wildcards.step)}/calibration.safetensors",
        before=lambda wildcards: tier_map(previous(wildcards.step)),
        tier_map="results/{step}/tier_map_2_4.safetensors",
    output:
        tier_map="results/{step}/tier_map.safetensors",
        model="results/{step}/pruned_model/model.safetensors.index.json",
    log:
        "results/logs/{step}/degrade_2_4_to_topk.log",
    benchmark:
        "results/benchmarks/{step}/degrade_2_4_to_topk.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/three-tier",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "degrade_2_4_to_topk.py",
        code=code_hash("degrade_2_4_to_topk.py"),
        folder=lambda wildcards: model_folder(previous(wildcards.step)),
        selection=config["pruning"]["selection"],
        pruned=subpath(output.model, parent=True),
    message:
        "{wildcards.step}: 2:4 blocks down to TopK, and the pruned model"
    shell:
        "python {params.script} --model {params.folder} --calibration {input.calibration}"
        " --tier-map-before {input.before} --tier-map {input.tier_map} --selection {params.selection}"
        " --output-tier-map {output.tier_map} --output-model {params.pruned} --log {log}"


rule refit:
    input:
        dense=lambda wildcards: model_ready(previous(wildcards.step)),
        model="results/{step}/pruned_model/model.safetensors.index.json",
        masks=lambda wildcards: masks(wildcards.step),
    output:
        "results/{step}/refitted_model/model.safetensors.index.json",
    log:
        "results/logs/{step}/refit.log",
    benchmark:
        "results/benchmarks/{step}/refit.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/[^/]+",
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(32000),
        runtime=minutes(240),
        gpu=GPUS,
    params:
        script=SCRIPTS / "refit.py",
        code=code_hash("refit.py"),
        dense=lambda wildcards: model_folder(previous(wildcards.step)),
        pruned=subpath(input.model, parent=True),
        refitted=subpath(output[0], parent=True),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: refitting what was kept"
    shell:
        "python {params.script} --dense-model {params.dense} --model {params.pruned} --masks {input.masks}"
        " --text {params.text:q} {params.options} --seed {params.seed} --device {params.device} {params.trust}"
        " --output-model {params.refitted} --log {log}"


rule finetune:
    input:
        model=lambda wildcards: f"{start_folder(wildcards.step)}/model.safetensors.index.json",
        masks=lambda wildcards: masks(wildcards.step),
        teacher=lambda wildcards: model_ready("iter0") if distills(wildcards.step) else [],
    output:
        model="results/{step}/finetuned_model/model.safetensors.index.json",
        training="results/{step}/training.json",
    log:
        "results/logs/{step}/finetune.log",
    benchmark:
        "results/benchmarks/{step}/finetune.jsonl"
    conda:
        "../envs/finetune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(64000),
        runtime=minutes(1440),
        gpu=GPUS * config["recovery"]["processes"],
    params:
        script=SCRIPTS / "finetune.py",
        code=code_hash("finetune.py"),
        start=lambda wildcards: start_folder(wildcards.step),
        finetuned=subpath(output.model, parent=True),
        epochs=lambda wildcards: epochs(wildcards.step),
        text=text_arguments("recovery"),
        text_content=text_fingerprint("recovery"),
        options=lambda wildcards: recovery_flags(wildcards.step),
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: finetuning, {params.epochs} epochs"
    # The state of a training that was interrupted stands beside the outputs, which Snakemake deletes before it starts again.
    shell:
        "python {params.script} --model {params.start} --masks {input.masks} --step {wildcards.step}"
        " --epochs {params.epochs} --text {params.text:q} {params.options:q} --seed {params.seed}"
        " --device {params.device} {params.trust} --state results/state/{wildcards.step}"
        " --tensorboard results/logs/{wildcards.step}/tensorboard"
        " --output-model {params.finetuned} --output-log {output.training} --log {log}"
