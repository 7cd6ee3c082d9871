# All steps side by side: a table, figures, and Snakemake's own report with both.


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
        "python {params.script} --evals {input.evals} --output {output.table} --log {log} > {output.text}"


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
        "python {params.script} --evals {input.evals} --training {input.training} --tier-maps {input.tier_maps}"
        " --output-folder {params.folder} --log {log}"


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
    message:
        "the comparison of all runs"
    shell:
        "python {params.script} --evals {input.evals} --zero-shot {input.zero_shot}"
        " --measurements {input.measurements} --benchmarks results/benchmarks"
        " --output {output.table} --output-figure {output.figure} --log {log} > {output.text}"


# Snakemake reports on Snakemake's run: an environment that holds it takes the place of the one that runs the workflow.
rule html_report:
    input:
        rules.summarize.output.table,
        rules.plot.output,
        rules.compare.output.table,
        rules.compare.output.figure,
    output:
        "results/report.html",
    log:
        "results/logs/html_report.log",
    localrule: True
    conda:
        "../envs/workflow.yaml"
    params:
        script=SCRIPTS / "html_report.py",
        code=code_hash("html_report.py"),
        snakefile=os.path.relpath(workflow.main_snakefile),
        config=json.dumps(config),
        captions=[fingerprint(path) for path in sorted((ROOT / "workflow/report").glob("*.rst"))],
    message:
        "the report, results/report.html"
    shell:
        "python {params.script} --snakefile {params.snakefile:q} --config {params.config:q} --targets {input}"
        " --output {output} --log {log}"
