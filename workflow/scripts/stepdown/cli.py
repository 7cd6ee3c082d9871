"""What every command-line script shares: its log, its progress bars, and how it fails."""

import argparse
import contextlib
import gc
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NoReturn

from .errors import UserError
from .memory import map_large_tensors

log = logging.getLogger("stepdown")


def run(main: Callable[[argparse.Namespace], None], parser: argparse.ArgumentParser) -> None:
    """Parse the command line and call `main`; a `UserError` or a system error becomes one line and exit code 1."""
    parser.add_argument("--log", type=Path, help="also write messages to this file")
    parser.error = _refuse
    arguments = parser.parse_args()
    _open_log(arguments.log)
    map_large_tensors()
    try:
        main(arguments)
    except UserError as error:
        log.error("error: %s", error)
        sys.exit(1)
    except OSError as error:
        # Of a copy the second is the one that could not be written.
        log.error("error: %s: %s", error.filename2 or error.filename or parser.prog, error.strerror or error)
        log.debug("traceback", exc_info=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _refuse(message: str) -> NoReturn:
    """Instead of the usage, which is many lines."""
    print(f"error: {message} (--help tells what there is)", file=sys.stderr)
    sys.exit(1)


def tell(result: str) -> None:
    """Print a result, perhaps to a file on a disk that is full."""
    try:
        print(result, flush=True)
    except OSError as error:
        # Python writes what is left as it ends, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output: could not be written ({error.strerror})") from None


def whole_number(least: int = 1) -> Callable[[str], int]:
    """The type of an argument that is a whole number, `least` or more."""

    def read(text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,18}", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"found {text!r}; write a whole number, at least {least}")
        return int(text)

    return read


def positive(text: str) -> float:
    """The type of an argument that is a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"found {text!r}; write a number above 0")
    return number


def share(text: str) -> str:
    """The type of an argument that is a share, such as 0.35 or 7/20, which stays as it is written: exact."""
    if (
        not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]{1,3})?|[0-9]+/[0-9]*[1-9][0-9]*", text)
        or Fraction(text) > 1
    ):
        raise argparse.ArgumentTypeError(f"found {text!r}; write a share from 0 to 1")
    return text


def check_shares(names: str, shares: Sequence[str]) -> None:
    """Shares sum to 1, as near as a schedule may round them."""
    if abs((total := sum(map(Fraction, shares))) - 1) > Fraction(1, 10**6):
        raise UserError(f"{names}: found a sum of {float(total):g}; write three that sum to 1")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of a model, and how to run it."""
    parser.add_argument("--model", type=Path, required=True, help="folder of a Hugging Face model")
    add_device_arguments(parser)


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """Where a model runs, and whether its own code does."""
    add_device_argument(parser)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")


def add_hidden_states_argument(parser: argparse.ArgumentParser) -> None:
    """For what walks a model layer by layer."""
    help = "where hidden states wait between two layers (default: %(default)s)"
    parser.add_argument("--hidden-states", choices=("device", "cpu"), default="device", help=help)


def calibration_parser(description: str, run: str | None = None) -> argparse.ArgumentParser:
    """The parser of a script that sends calibration text through a model, as `prune.calibration` reads its arguments.

    run: what the name `--run` says, where the script does one of several things.
    """
    parser = argparse.ArgumentParser(description=description)
    if run:
        parser.add_argument("--run", required=True, help=run)
    add_model_arguments(parser)
    parser.add_argument("--text", default="pydoc", help="corpus name, path, or JSON of one path per split")
    parser.add_argument("--samples", type=whole_number(), default=128, help="windows of text (default: %(default)s)")
    parser.add_argument(
        "--sequence-length", type=whole_number(2), default=2048, help="tokens per window (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=whole_number(), default=1, help="windows at a time (default: %(default)s)")
    parser.add_argument("--seed", type=whole_number(0), default=0)
    add_hidden_states_argument(parser)
    return parser


def add_output_arguments(parser: argparse.ArgumentParser, checkpoint: str, report: str) -> None:
    """Where a new checkpoint goes and where what is to be said of it, both in a few words."""
    parser.add_argument("--output-model", type=Path, required=True, help=f"folder of the {checkpoint} checkpoint")
    parser.add_argument("--output-report", type=Path, required=True, help=f"JSON: {report}")


def progress(items: Iterable, description: str, total: int | None = None) -> Iterable:
    """A progress bar on stderr, silent when stderr is not a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=description, total=total, disable=None, dynamic_ncols=True)


@contextlib.contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """For what makes many small objects that all stay, such as an import, or have no cycles, such as a syntax tree:
    looking for garbage among them takes up to as long as making them."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _open_log(path: Path | None) -> None:
    """Messages go to stderr; with a path, they and the traceback of an unexpected failure go to the file too."""
    console = logging.StreamHandler()
    console.setLevel(logging.INFO)
    handlers: list[logging.Handler] = [console]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(path, mode="w", encoding="utf-8"))
    # On a full disk the log is what may be lost, not the message on the console.
    logging.raiseExceptions = False
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers[:] = handlers
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
    _draw_no_other_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _draw_no_other_bars() -> None:
    """Libraries draw bars of their own over ours. Only as they are imported do they look at the environment."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()
