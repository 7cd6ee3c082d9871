"""Import a model of others, a folder, an id on the hub or a GGUF file, as the base model of a run: checked for all that
later jobs read of it, told what of it can be pruned."""

import os
import shutil
from pathlib import Path

import torch
from transformers import GenerationConfig

from ..cli import log
from ..errors import UserError
from ..files import INDEX_NAME, SINGLE_FILE_NAME, has_only_pickles
from ..plan.gguf_header import is_gguf
from ..plan.model_files import check_tokenizer, check_weights, has_tokenizer
from .checkpoint import beside_layers, check_not_inside, check_replaceable, new_folder, side_files
from .decoder import Decoder, build_empty, open_decoder, unload
from .gguf import import_gguf
from .layer_walk import LayerWalk
from .linears import as_linears_
from .loading import load_model, load_tokenizer, told_in_one_line
from .quantised_checkpoint import open_checkpoint
from .sliced import read_width
from .stored_names import find_names, write_computed

# Of the decoder layers' weights; what cannot be pruned and is more of them is warned of.
NOTABLE = 0.01
# What of a token's hidden state may change with those after it: types of 16 bits round to less.
ROUNDING = 0.01


def import_model(model: str, revision: str | None, target: Path, trust_remote_code: bool = False) -> Decoder:
    """Bring a model to the folder `target`, by links where nothing has to be written anew, and open it.

    model: folder, id on the hub (with a revision), or GGUF file. Raises `UserError` for what no later job could use.
    """
    if is_gguf(model):
        import_gguf(Path(model), target)
    else:
        import_folder(local_folder(model, revision), target, trust_remote_code)
    decoder = open_decoder(target, "cpu", trust_remote_code)
    check_layers(decoder)
    check_causal(decoder)
    check_side_files(target, trust_remote_code)
    return decoder


def import_folder(source: Path, target: Path, trust_remote_code: bool) -> None:
    """Link the files of a folder, or write the model anew where its weights are pickled or not in the form it uses."""
    check_weights(source)
    check_not_inside(source, target)
    if read_width(source):
        raise UserError(f"{source}: sliced already, which transformers does not load; give the model before that")
    if has_only_pickles(source):
        convert(source, target, trust_remote_code)
    elif not convert_stored_forms(source, target, trust_remote_code):
        link_files(source, target)


def local_folder(model: str, revision: str | None) -> Path:
    """The folder of a model: itself, or what the hub gives for an id."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.py"]
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
        if not any((folder / name).is_file() for name in (SINGLE_FILE_NAME, INDEX_NAME)):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*patterns, "pytorch_model*.bin"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {model}: no such folder, and the hub does not give it ({reason})") from None
    return folder


def convert(source: Path, target: Path, trust_remote_code: bool) -> None:
    """Save a model the way its family is published: in safetensors, experts one by one. Pickles are loaded as weights
    only."""
    model = load_model(source, "auto", trust_remote_code)
    # Otherwise it would be saved the way it was found.
    model._weight_conversions = None
    if (source / "generation_config.json").exists():
        # Copied below: transformers does not save everything that it reads.
        model.generation_config = GenerationConfig()
    with new_folder(target) as folder:
        with told_in_one_line(source, "transformers cannot save it in safetensors"):
            model.save_pretrained(folder)
        for file in side_files(source):
            if file.name != "config.json":
                shutil.copyfile(file, folder / file.name)


def convert_stored_forms(source: Path, target: Path, trust_remote_code: bool) -> bool:
    """Write what transformers would compute while loading, such as convolutions that it joins; whether there is any."""
    checkpoint = open_checkpoint(source)
    separate = build_empty(source, trust_remote_code)
    as_linears_(separate)
    naming = find_names(separate, checkpoint.names)
    if naming.computed:
        write_computed(build_empty(source, trust_remote_code), checkpoint, naming, target)
    return bool(naming.computed)


def link_files(source: Path, target: Path) -> None:
    """A folder of links to the files of another: nothing is copied, and the user's folder is never written to."""
    check_replaceable(target)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    # Links stay right when the project is moved with the model inside it.
    inside = source.resolve().is_relative_to(Path.cwd())
    for file in source.iterdir():
        if file.is_file():
            to = os.path.relpath(file.resolve(), target.resolve()) if inside else file.resolve()
            (target / file.name).symlink_to(to)


def check_side_files(folder: Path, trust_remote_code: bool) -> None:
    """What later jobs read beside the weights, so that none of them is the first to find fault with it."""
    if has_tokenizer(folder):
        check_tokenizer(folder)
        load_tokenizer(folder, trust_remote_code)
    if (folder / "generation_config.json").is_file():
        with told_in_one_line(folder / "generation_config.json", "transformers cannot read it"):
            GenerationConfig.from_pretrained(folder)


def check_layers(decoder: Decoder) -> None:
    """Everything the model has is stored, and no layer is stored that it does not have, but for those its family leaves
    out."""
    model, checkpoint = decoder.model, decoder.checkpoint
    missing = sorted(dict(model.named_parameters()).keys() - decoder.stored.keys())
    if missing:
        raise UserError(
            f"{checkpoint.folder}: no tensor for {missing[0]}, which config.json asks for; take both from one model"
        )
    for name in dict(model.named_parameters()):
        if checkpoint.holds_integers(decoder.stored[name]):
            raise UserError(
                f"{checkpoint.folder}: {name} is stored as whole numbers; give the model before it was quantised"
            )
    left_out = model._keys_to_ignore_on_load_unexpected
    for name in beside_layers(checkpoint.names, decoder.stored.values(), left_out):
        raise UserError(
            f"{checkpoint.folder}: config.json has {len(decoder.layers)} layers, the weights also hold {name}; "
            "take both from one model"
        )


def check_causal(decoder: Decoder) -> None:
    """The first layer makes the same of tokens whichever comes after them: the perplexity of a model that sees what it
    should foresee says nothing."""
    tokens = torch.arange(3, 10)[None]
    walk = LayerWalk(decoder, [tokens, torch.cat([tokens[:, :-1], tokens[:, -1:] + 1], 1)])
    for _, layer, replay in walk.layers(None):
        replay()
        unload(layer)
        break
    # Families differ in where tokens stand, in what they put before them, and in how many states they have of each.
    shape = walk.states[0].shape[:-1]
    place = max((dim for dim, size in enumerate(shape) if size >= tokens.numel()), default=0)
    state, other = (state.float().movedim(place, 0).flatten(1) for state in walk.states)
    changed = (state - other).norm(dim=1) > ROUNDING * state.norm(dim=1)
    if changed.sum() > len(state) // tokens.numel():
        family = decoder.model.config.model_type
        raise UserError(
            f"{decoder.checkpoint.folder}: each token of the family {family!r} sees those after it, so that no"
            " perplexity says anything; give a model that reads from left to right, or set is_decoder: true in"
            " config.json where the family has that key"
        )


def tell_what_is_pruned(decoder: Decoder) -> None:
    """Say which share of the decoder layers' weights can be pruned, and name what cannot and why."""
    linears, weights = decoder.linears(), decoder.weights()
    prunable = sum(linear.weight.numel() for linear in linears.values())
    counted = f"{prunable:,} weights, {prunable / weights:.1%} of those in the decoder layers"
    log.info("%d matrices to prune, %s", len(linears), counted)
    for name, (kind, count) in sorted(decoder.left_dense().items()):
        level = log.warning if count >= NOTABLE * weights else log.info
        level("%s stays dense: %s weights (%.1f %%) of %s, no linears", name, f"{count:,}", 100 * count / weights, kind)
