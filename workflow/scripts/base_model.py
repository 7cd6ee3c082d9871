"""Bring the base model of a run to its place and write its tier map, in which every block is Dense."""

import argparse
import os
import re
import shutil
from pathlib import Path

from transformers import GenerationConfig

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import INDEX_NAME, SINGLE_FILE_NAME, has_only_pickles
from stepdown.models.checkpoint import new_folder, shard_of, side_files, write_base_index
from stepdown.models.decoder import Decoder, build_empty, open_decoder
from stepdown.models.gguf import import_gguf
from stepdown.models.linears import as_linears_
from stepdown.models.loading import load_model, load_tokenizer, told_in_one_line
from stepdown.models.quantised_checkpoint import open_checkpoint
from stepdown.models.stored_names import find_names, write_computed
from stepdown.models.tier_maps import dense_tier_map, write_tier_map
from stepdown.plan.gguf_header import is_gguf
from stepdown.plan.model_files import check_tokenizer, check_weights, has_tokenizer

# Of the decoder layers' weights; what cannot be pruned and is more of them is warned of.
NOTABLE = 0.01


def main(arguments: argparse.Namespace) -> None:
    if is_gguf(arguments.model):
        import_gguf(Path(arguments.model), arguments.output_model)
    else:
        import_folder(arguments)
    decoder = open_decoder(arguments.output_model, "cpu", arguments.trust_remote_code)
    check_layers(decoder)
    check_side_files(arguments.output_model, arguments.trust_remote_code)
    shapes = {name: tuple(linear.weight.shape) for name, linear in decoder.linears().items()}
    tell_what_is_pruned(decoder)
    base_model = write_base_index(decoder.checkpoint)
    write_tier_map(dense_tier_map(shapes, arguments.block_size, arguments.k, base_model), arguments.output_tier_map)


def import_folder(arguments: argparse.Namespace) -> None:
    source = local_folder(arguments.model, arguments.revision)
    check_weights(source)
    if has_only_pickles(source):
        convert(source, arguments.output_model, arguments.trust_remote_code)
    elif not convert_stored_forms(source, arguments.output_model, arguments.trust_remote_code):
        link_files(source, arguments.output_model)


def tell_what_is_pruned(decoder: Decoder) -> None:
    """Say which share of the decoder layers' weights can be pruned, and name what cannot and why."""
    linears, weights = decoder.linears(), decoder.weights()
    prunable = sum(linear.weight.numel() for linear in linears.values())
    counted = f"{prunable:,} weights, {prunable / weights:.1%} of those in the decoder layers"
    cli.log.info("%d matrices to prune, %s", len(linears), counted)
    for name, (kind, count) in sorted(decoder.left_dense().items()):
        level = cli.log.warning if count >= NOTABLE * weights else cli.log.info
        level("%s stays dense: %s weights (%.1f %%) of %s, no linears", name, f"{count:,}", 100 * count / weights, kind)


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
    used = {shard_of(name) for name in decoder.stored.values()}
    left_out = [name for name in checkpoint.names if shard_of(name) not in used]
    left_out = [name for name in left_out if shard_of(name).rpartition(".")[0] in {s.rpartition(".")[0] for s in used}]
    for name in left_out:
        if not any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ()):
            raise UserError(
                f"{checkpoint.folder}: config.json has {len(decoder.layers)} layers, the weights also hold {name}; "
                "take both from one model"
            )


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
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    # Links stay right when the project is moved with the model inside it.
    inside = source.resolve().is_relative_to(Path.cwd())
    for file in source.iterdir():
        if file.is_file():
            to = os.path.relpath(file.resolve(), target.resolve()) if inside else file.resolve()
            (target / file.name).symlink_to(to)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", required=True, help="folder of a Hugging Face model, its id on the hub, or a GGUF file"
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--block-size", type=int, default=16, help="edge of a block (default: %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="weights kept in a TopK block (default: %(default)s)")
    parser.add_argument("--output-model", type=Path, required=True, help="folder to make, of links where it can be")
    parser.add_argument("--output-tier-map", type=Path, required=True)
    cli.run(main, parser)
