"""What transformers makes of a folder: configuration, model, tokenizer; what it does not take is told in one line."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..cli import collecting_no_garbage, log
from ..errors import UserError
from ..files import has_only_pickles, safetensors_header, weight_files
from .checkpoint import beside_layers

# Of a reason; some libraries write pages.
REASON_LENGTH = 300
ADVICE = "mend what it names, or take another model"
UNUSUAL = "Zwölf, \N{GRINNING FACE}\n"


def load_model(folder: Path | str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> nn.Module:
    """The causal language model of a folder with its weights; `auto` is the type they are stored in."""
    # transformers does not say which file is not whole.
    for file in [] if has_only_pickles(Path(folder)) else weight_files(folder):
        safetensors_header(file)

    def load(config: PretrainedConfig) -> nn.Module:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code, "output_loading_info": True}
        model, found = AutoModelForCausalLM.from_pretrained(folder, config=config, **options)
        _check_all_found(folder, model, found)
        return model

    return build_model(folder, load, trust_remote_code)


def _check_all_found(folder: Path | str, model: nn.Module, found: Mapping[str, Collection[str]]) -> None:
    """What is not stored transformers makes up, and what the model has no place for it leaves out, without an error."""
    for name in sorted(dict(model.named_parameters()).keys() & set(found["missing_keys"])):
        raise UserError(f"{folder}: no tensor for {name}, which config.json asks for; take both from one model")
    for name in beside_layers(found["unexpected_keys"], model.state_dict()):
        raise UserError(
            f"{folder}: the weights also hold {name}, for which config.json has no layer; take both from one model"
        )


@collecting_no_garbage()
def build_model(
    folder: Path | str, build: Callable[[PretrainedConfig], nn.Module], trust_remote_code: bool = False
) -> nn.Module:
    """What `build` makes of a folder's configuration; where the attention it names is not installed, with what
    transformers takes by itself. Raises `UserError` with the library's reason."""
    with told_in_one_line(folder, "not a causal language model that transformers can load"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Whoever runs the model asks for its outputs by name.
        config.return_dict = config.get_text_config().return_dict = True
        try:
            return build(config)
        except ImportError as error:
            asked = config._attn_implementation
            if not asked or "flash" not in str(asked):
                raise
            config._attn_implementation = None
            model = build(config)
            log.warning(
                "%s: %s is not to be had here (%s); %s takes its place",
                folder,
                asked,
                reason_of(error),
                model.config._attn_implementation,
            )
            return model


@collecting_no_garbage()
def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder; raises `UserError` where it has tokens that the embedding has no row for."""
    has_one = (Path(folder) / "tokenizer.json").is_file()
    advice = ADVICE if has_one else "copy its tokenizer.json too, or pip install sentencepiece tiktoken"
    with told_in_one_line(folder, "no tokenizer that transformers can load", advice):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        # Some raise at the first word that they do not know.
        tokenizer(UNUSUAL)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if rows is not None:
        numbers = set(tokenizer.get_vocab().values())
        # Some models are published with a special token that no text holds and no row is there for.
        unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        unused -= set(tokenizer("").input_ids)
        if max(numbers - unused, default=0) >= rows:
            raise UserError(
                f"{folder}: the tokenizer has {max(numbers) + 1} tokens, the embedding {rows} rows; "
                "take both from the same model"
            )
        # For whoever reads a text, which may hold one all the same.
        tokenizer.embedding_rows = rows
    return tokenizer


@contextmanager
def told_in_one_line(folder: Path | str, what: str, advice: str = ADVICE) -> Iterator[None]:
    """Whatever libraries raise over a folder's files, which are as many kinds as there are files, as a `UserError`."""
    try:
        with _warnings_once_done():
            yield
    except UserError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: comes with code of its own; if you trust it, set trust_remote_code: true (by hand"
                " --trust-remote-code)"
            ) from None
        raise UserError(f"{folder}: {what} ({reason_of(error)}); {advice}") from error


@contextmanager
def _warnings_once_done() -> Iterator[None]:
    """Hold back what transformers warns of until all went well; of what fails, the reason is enough to read."""
    logger = logging.getLogger("transformers")
    handlers, waiting = logger.handlers, MemoryHandler(capacity=1000)
    logger.handlers = [waiting]
    try:
        yield
    finally:
        logger.handlers = handlers
    for record in waiting.buffer:
        logger.handle(record)


def reason_of(error: Exception) -> str:
    """The kind and the words of an exception in one line."""
    words = " ".join(f"{type(error).__name__}: {error}".split())
    return words if len(words) <= REASON_LENGTH else f"{words[:REASON_LENGTH]} ..."
