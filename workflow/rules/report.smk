# All steps side by side: a table and figures.


rule summarize:
    input:
        evals=EVALS,
    output:
        table=report(
            "results/summary.csv", caption="../report/summary.rst", category="Summary", labels={"what": "table"}
        ),
        text="results/summary.txt",
    log:
        "results/logs/summarize.log",
    benchmark:
        "results/benchmarks/summarize.jsonl"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        script=SCRIPTS / "summarize.py",
        code=code_hash("summarize.py"),
    message:
        "the table of all steps"
    shell:
        "python {params.script:q} --evals {input.evals:q} --output {output.table:q} --log {log:q} > {output.text:q}"


rule plot:
    input:
        evals=EVALS,
        training=TRAINING,
        tier_maps=TIER_MAPS,
    output:
        perplexity=figure("perplexity"),
        tier_shares=figure("tier_shares"),
        tier_maps=figure("tier_maps"),
        training=figure("training"),
    log:
        "results/logs/plot.log",
    benchmark:
        "results/benchmarks/plot.jsonl"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        script=SCRIPTS / "plot.py",
        code=code_hash("plot.py"),
        folder=subpath(output.perplexity, parent=True),
    message:
        "the figures"
    shell:
        "python {params.script:q} --evals {input.evals:q} --training {input.training:q} --tier-maps {input.tier_maps:q}"
        " --output-folder {params.folder:q} --log {log:q}"


rule compare:
    input:
        evals=ALL_EVALS,
        zero_shot=ZERO_SHOT,
        measurements=MEASUREMENTS,
    output:
        table=report(
            "results/compare.csv", caption="../report/compare.rst", category="Comparison", labels={"what": "table"}
        ),
        figure=figure("comparison", category="Comparison"),
        text="results/compare.txt",
    log:
        "results/logs/compare.log",
    benchmark:
        "results/benchmarks/compare.jsonl"
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        script=SCRIPTS / "compare.py",
        code=code_hash("compare.py"),
        results=subpath(output.table, parent=True),
    message:
        "the comparison of all runs"
    shell:
        "python {params.script:q} --evals {input.evals:q} --zero-shot {input.zero_shot:q}"
        " --measurements {input.measurements:q} --benchmarks {params.results:q}/benchmarks"
        " --output {output.table:q} --output-figure {output.figure:q} --log {log:q} > {output.text:q}"
