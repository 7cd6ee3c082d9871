# The entry for a plain `snakemake` in this folder. The workflow is workflow/Snakefile, where Snakemake's catalog and
# workflows that use it as a module look for it; `snakemake -s workflow/Snakefile` is the same.
include: "workflow/Snakefile"


# What is included gives no default target.
rule everything:
    default_target: True
    input:
        rules.all.input,
