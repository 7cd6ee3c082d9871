"""Write a model as a GGUF file, so that llama.cpp and what is built on it run it: bf16, or Q8_0, zeros kept.

python workflow/scripts/gguf_file.py --model results/iter5/finetuned_model --output model.gguf
"""

import argparse
from pathlib import Path

from stepdown import cli
from stepdown.models.gguf_export import VALUES, export_gguf


def main(arguments: argparse.Namespace) -> None:
    export_gguf(arguments.model, arguments.output, arguments.values)
    cli.log.info("%s: %d bytes", arguments.output, arguments.output.stat().st_size)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face model")
    parser.add_argument("--values", choices=list(VALUES), default="bf16", help="of matrices (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="the GGUF file")
    cli.run(main, parser)
