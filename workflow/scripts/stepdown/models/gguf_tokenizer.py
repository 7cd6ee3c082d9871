"""A tokenizer as the metadata of a GGUF file, as llama.cpp reads them: byte-level BPE, or SentencePiece's BPE."""

import json
import re
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from ..errors import UserError
from .loading import load_tokenizer

BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path, rows: int) -> None:
    """Add the tokenizer of a model folder; rows: of the embedding, of which those without a token get one that no text
    has. Raises `UserError` for a kind of tokenizer that llama.cpp is not told of here."""
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend else {"model": {"type": type(tokenizer).__name__}}
    if state["model"]["type"] != "BPE":
        raise UserError(
            f"{folder}: a tokenizer of the kind {state['model']['type']!r}; BPE is written to GGUF, for others use"
            " convert_hf_to_gguf.py"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]
    tokens, types = tokens_of(state, rows)
    if state["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores_of(tokens, merges))
        writer.add_add_space_prefix(_adds_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer_of(state, folder))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special_tokens(writer, tokenizer)


def tokens_of(state: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """The token of each row of the embedding, and its type."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    types = [int(TokenType.UNUSED)] * rows
    for token, row in state["model"]["vocab"].items():
        # Some models are published with special tokens that no row is there for.
        if row >= rows:
            continue
        byte = state["model"].get("byte_fallback") and BYTE.fullmatch(token)
        kind = TokenType.UNKNOWN if token == state["model"].get("unk_token") else TokenType.NORMAL
        tokens[row], types[row] = token, int(TokenType.BYTE if byte else kind)
    for added in state["added_tokens"]:
        row = added["id"]
        if row < rows:
            tokens[row] = added["content"]
            if types[row] != TokenType.UNKNOWN:
                types[row] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, types


def scores_of(tokens: list[str], merges: list[str]) -> list[float]:
    """llama.cpp merges what gives the token of the highest score; so the token of the first merge has the highest."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", ""), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def pre_tokenizer_of(state: dict[str, Any], folder: Path) -> str:
    """What llama.cpp calls the way a byte-level tokenizer splits text into words."""
    first = state["pre_tokenizer"] or {}
    steps = first.get("pretokenizers") or [first]
    *before, last = steps
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        kinds = [step["type"] for step in before]
        if last["use_regex"] and not kinds:
            return "gpt-2"
        if last["use_regex"] and kinds == ["Digits"] and before[0]["individual_digits"]:
            return "smollm"
        if not last["use_regex"] and kinds == ["Split"]:
            pattern = before[0]["pattern"].get("Regex")
            for name, known in GGUF_PRE_TOKENIZER_SPLITS.items():
                if known == pattern:
                    return name
    raise UserError(
        f"{folder}: its tokenizer splits text in a way that has no name here ({json.dumps(first)[:120]}); use"
        " convert_hf_to_gguf.py"
    )


def _adds_space(state: dict[str, Any]) -> bool:
    """Whether a text is read as if a space stood before it."""
    normalizer, pre_tokenizer = state["normalizer"] or {}, state["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer])
    return (
        any(step.get("type") == "Prepend" for step in steps) or pre_tokenizer.get("prepend_scheme", "never") != "never"
    )


def _add_special_tokens(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("bos", "eos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a").input_ids
    writer.add_add_bos_token(encoded[:1] == [tokenizer.bos_token_id])
    writer.add_add_eos_token(encoded[-1:] == [tokenizer.eos_token_id])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
