# One step: calibrate, score, degrade twice, refit, reconstruct, finetune. The same rules make the iterations and the one-shot run.


rule base_model:
    output:
        tier_map=f"results/{IMPORTED}/tier_map.safetensors",
    log:
        "results/logs/iter0/base_model.log",
    benchmark:
        "results/benchmarks/iter0/base_model.jsonl"
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(4000),
        runtime=minutes(240),
    params:
        script=SCRIPTS / "base_model.py",
        code=code_hash("base_model.py"),
        model=as_written(MODEL),
        model_content=as_written(fingerprints.model_fingerprint(MODEL)),
        model_options=as_written(flags({"revision": config["revision"]}) + TRUST),
        block=flags({key: config["pruning"][key] for key in ("block_size", "k")}),
        folder=subpath(output.tier_map, parent=True),
    message:
        "iter0: the base model, {params.model}"
    shell:
        "python {params.script:q} --model {params.model:q} {params.model_options:q} {params.block:q}"
        " --output-model {params.folder:q}/model --output-tier-map {output.tier_map:q} --log {log:q}"


rule calibrate:
    input:
        model=model_before,
    output:
        "results/{step}/calibration.safetensors",
    log:
        "results/logs/{step}/calibrate.log",
    benchmark:
        "results/benchmarks/{step}/calibrate.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*",
    priority: ON_THE_WAY
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
        folder=folder_of("model"),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        cost=config["pruning"]["cost"],
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: what the inputs of every matrix are like, and what its outputs do to the loss"
    shell:
        "python {params.script:q} --model {params.folder:q} --text {params.text:q} {params.options:q}"
        " --cost {params.cost:q} --seed {params.seed:q} --device {params.device:q} {params.trust:q} --output {output:q} --log {log:q}"


rule score:
    input:
        model=model_before,
        calibration="results/{step}/calibration.safetensors",
        tier_map=tier_map_before,
    output:
        "results/{step}/scores.safetensors",
    log:
        "results/logs/{step}/score.log",
    benchmark:
        "results/benchmarks/{step}/score.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*",
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
        gpu=GPUS,
    params:
        script=SCRIPTS / "score.py",
        code=code_hash("score.py"),
        folder=folder_of("model"),
        device=config["device"],
        cost=config["pruning"]["cost"],
    message:
        "{wildcards.step}: what it costs every block to step down"
    shell:
        "python {params.script:q} --model {params.folder:q} --calibration {input.calibration:q}"
        " --device {params.device:q} --tier-map {input.tier_map:q} --cost {params.cost:q} --output {output:q}"
        " --log {log:q}"


rule degrade_dense_to_2_4:
    input:
        scores=of_statistics("scores"),
        tier_map=tier_map_before,
        target=branch(config["pruning"]["target"], then="results/target_shares.json"),
    output:
        "results/{step}/tier_map_2_4.safetensors",
    log:
        "results/logs/{step}/degrade_dense_to_2_4.log",
    benchmark:
        "results/benchmarks/{step}/degrade_dense_to_2_4.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/three-tier",
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    resources:
        mem_mb=memory(4000),
        runtime=minutes(60),
    params:
        script=SCRIPTS / "degrade_dense_to_2_4.py",
        code=code_hash("degrade_dense_to_2_4.py"),
        iteration=of_row("iteration"),
        dense=of_row("dense"),
        mid_2_4=of_row("mid_2_4"),
        topk=of_row("topk"),
        target=target_flags,
        last=last_row_flags,
        shared_over=config["pruning"]["shared_over"],
    message:
        "{wildcards.step}: dense blocks down to 2:4"
    shell:
        "python {params.script:q} --scores {input.scores:q} --tier-map {input.tier_map:q}"
        " --iteration {params.iteration:q} --dense {params.dense:q} --mid-2-4 {params.mid_2_4:q} --topk {params.topk:q}"
        " {params.target:q} {params.last:q} --shared-over {params.shared_over} --output {output:q} --log {log:q}"


rule degrade_2_4_to_topk:
    input:
        model=model_before,
        calibration=of_statistics("calibration"),
        before=tier_map_before,
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
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(8000),
        runtime=minutes(60),
        gpu=GPUS,
    params:
        script=SCRIPTS / "degrade_2_4_to_topk.py",
        code=code_hash("degrade_2_4_to_topk.py"),
        folder=folder_of("model"),
        selection=config["pruning"]["selection"],
        pruned=subpath(output.model, parent=True),
        device=config["device"],
    message:
        "{wildcards.step}: 2:4 blocks down to TopK, and the pruned model"
    shell:
        "python {params.script:q} --model {params.folder:q} --calibration {input.calibration:q}"
        " --tier-map-before {input.before:q} --tier-map {input.tier_map:q} --selection {params.selection:q}"
        " --device {params.device:q} --output-tier-map {output.tier_map:q} --output-model {params.pruned:q} --log {log:q}"


rule refit:
    input:
        dense=model_before,
        model="results/{step}/pruned_model/model.safetensors.index.json",
        masks=masks_of,
    output:
        "results/{step}/refitted_model/model.safetensors.index.json",
    log:
        "results/logs/{step}/refit.log",
    benchmark:
        "results/benchmarks/{step}/refit.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/[^/]+",
    priority: ON_THE_WAY
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
        dense=folder_of("dense"),
        pruned=subpath(input.model, parent=True),
        refitted=subpath(output[0], parent=True),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=section_flags("calibration"),
        swaps=swaps_flags,
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: refitting what was kept"
    shell:
        "python {params.script:q} --dense-model {params.dense:q} --model {params.pruned:q} --masks {input.masks:q}"
        " --text {params.text:q} {params.options:q} {params.swaps:q} --seed {params.seed:q} --device {params.device:q}"
        " {params.trust:q} --output-model {params.refitted:q} --log {log:q}"


rule reconstruct:
    input:
        dense=model_before,
        model="results/{step}/refitted_model/model.safetensors.index.json",
        masks=masks_of,
    output:
        "results/{step}/reconstructed_model/model.safetensors.index.json",
    log:
        "results/logs/{step}/reconstruct.log",
    benchmark:
        "results/benchmarks/{step}/reconstruct.jsonl"
    wildcard_constraints:
        step=r"iter[1-9]\d*|oneshot/[^/]+",
    priority: ON_THE_WAY
    conda:
        "../envs/prune.yaml"
    threads: THREADS
    resources:
        mem_mb=memory(64000),
        runtime=minutes(720),
        gpu=GPUS,
    params:
        script=SCRIPTS / "reconstruct.py",
        code=code_hash("reconstruct.py"),
        dense=folder_of("dense"),
        refitted=subpath(input.model, parent=True),
        reconstructed=subpath(output[0], parent=True),
        text=text_arguments("calibration"),
        text_content=text_fingerprint("calibration"),
        options=reconstruction_flags,
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: every layer trained to make again what it made before pruning"
    shell:
        "python {params.script:q} --dense-model {params.dense:q} --model {params.refitted:q} --masks {input.masks:q}"
        " --text {params.text:q} {params.options:q} --seed {params.seed:q} --device {params.device:q} {params.trust:q}"
        " --output-model {params.reconstructed:q} --log {log:q}"


rule finetune:
    input:
        model=model_to_finetune,
        masks=masks_of,
        teacher=branch(distills, then=base_model_of),
    output:
        model="results/{step}/finetuned_model/model.safetensors.index.json",
        training="results/{step}/training.json",
    log:
        "results/logs/{step}/finetune.log",
    benchmark:
        "results/benchmarks/{step}/finetune.jsonl"
    priority: ON_THE_WAY
    conda:
        "../envs/finetune.yaml"
    threads: THREADS
    resources:
        # Each process has the whole model, but for one in shards.
        mem_mb=memory(64000 * (1 if config["recovery"]["sharded"] else config["recovery"]["processes"])),
        runtime=minutes(1440),
        gpu=GPUS * config["recovery"]["processes"],
    params:
        script=SCRIPTS / "finetune.py",
        code=code_hash("finetune.py"),
        start=subpath(input.model, parent=True),
        finetuned=subpath(output.model, parent=True),
        epochs=epochs,
        results=results_folder,
        text=text_arguments("recovery"),
        text_content=recovery_text_content,
        options=recovery_flags,
        settings=recovery_settings,
        seed=config["seed"],
        device=config["device"],
        trust=TRUST,
    message:
        "{wildcards.step}: finetuning, {params.epochs} epochs"
    # The state of an interrupted training stands beside the outputs, which Snakemake deletes before it starts again.
    shell:
        "python {params.script:q} --model {params.start:q} --masks {input.masks:q} --step {wildcards.step:q}"
        " --epochs {params.epochs:q} --text {params.text:q} {params.options:q} --seed {params.seed:q}"
        " --device {params.device:q} {params.trust:q} --state {params.results:q}/state/{wildcards.step:q}"
        " --tensorboard {params.results:q}/logs/{wildcards.step:q}/tensorboard"
        " --output-model {params.finetuned:q} --output-log {output.training:q} --log {log:q}"
