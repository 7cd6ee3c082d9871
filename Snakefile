# stepdown: a language model's weight blocks step down, Dense -> 2:4 -> TopK, row by row of the schedule, and recover in between.
#
#   snakemake -j1                             everything: all steps, the table, the figures, results/report.html
#   snakemake -j1 results/iter2/eval.json     the first two iterations only

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/run.smk"


wildcard_constraints:
    step=r"iter[1-9]\d*|(oneshot|gradual)/[^/]+",
    run=r"[^/]+",
    source=r"iter\d+|(oneshot|gradual|structured)/[^/]+",
    compressed=r"structured/[^/]+|(quantised|dynamic)/[^/]+/(iter\d+|(oneshot|gradual|structured)/[^/]+)",


rule all:
    default_target: True
    input:
        ALL_EVALS,
        ZERO_SHOT,
        "results/summary.csv",
        "results/compare.csv",
        "results/report.html",


include: "workflow/rules/progressive.smk"
include: "workflow/rules/oneshot.smk"
include: "workflow/rules/compressed.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/zero_shot.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/pack.smk"
