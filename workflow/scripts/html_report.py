"""Have Snakemake write its own report on a finished run: the table, the figures, and how they came about."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from stepdown import cli


def main(arguments: argparse.Namespace) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as config:
        config.write(arguments.config)
        config.flush()
        command = [sys.executable, "-m", "snakemake", "--snakefile", arguments.snakefile, "--nolock"]
        command += ["--configfile", config.name, "--report", arguments.output, "--", *arguments.targets]
        finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if finished.returncode:
        cli.log.error("error: Snakemake has not written %s:\n%s", arguments.output, finished.stdout)
        sys.exit(1)
    cli.log.debug(finished.stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--snakefile", type=Path, required=True, help="the workflow that has run")
    parser.add_argument("--config", default="{}", help="the configuration it ran with, as JSON")
    parser.add_argument("--targets", type=Path, nargs="+", required=True, help="results to report on")
    parser.add_argument("--output", type=Path, required=True, help="the .html file to write")
    cli.run(main, parser)
