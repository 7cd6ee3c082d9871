# Snakemake's own report on the run, with the table and the figures: an environment that holds Snakemake takes the place
# of the one that runs the workflow.


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
        snakefile=as_written(os.path.relpath(PROJECT / "workflow/Snakefile")),
        config=as_written(json.dumps(config)),
        captions=[fingerprints.fingerprint(path) for path in sorted((PROJECT / "workflow/report").glob("*.rst"))],
    message:
        "the report, results/report.html"
    shell:
        "python {params.script:q} --snakefile {params.snakefile:q} --config {params.config:q} --targets {input:q}"
        " --output {output:q} --log {log:q}"
