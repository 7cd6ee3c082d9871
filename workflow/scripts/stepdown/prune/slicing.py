"""SliceGPT: the residual loses the directions in which it varies least (Ashkboos et al. 2024).

An RMSNorm commutes with a rotation of its input: with the norms' weights fused into the matrices that read them, the
residual may be turned into any basis Q that the matrices writing to it and reading from it are turned into as well. In
that of its principal components on calibration text the last ones are cut off: W_in <- W_in diag(gamma) Q, W_out <-
Q' W_out, Q cut to its first columns. Each basis is found on what the layers sliced before make of the text, and a
shortcut matrix Q_before' Q_after turns the residual from one into the next.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ..cli import progress
from ..errors import UserError
from ..memory import give_back_freed
from ..models.checkpoint import REST, load_tensors, save_tensors, waiting_beside, write_checkpoint
from ..models.decoder import Decoder, load_module, unload
from ..models.layer_walk import LayerWalk
from ..models.linears import watching_inputs
from ..models.sliced import FILE_NAME, FORMAT, Form, as_sliced_layer_, form_of
from ..plan.compressions import check_sliceable
from .layerwise import LoadedLayer, visit

# Of a matrix, in float64 at a time.
ROWS = 1024


@torch.no_grad()
def slice_checkpoint(
    decoder: Decoder, windows: Tensor, batch_size: int, width: int, target: Path, identity: dict[str, str]
) -> None:
    """Write the model with its residual cut to `width`; one layer and the states of all windows are in memory.

    windows: int64 [samples, tokens]. Raises `UserError` for a family that cannot be rotated.
    """
    config = decoder.model.config
    check_sliceable(config.model_type, config.to_dict(), decoder.checkpoint.folder)
    walk = LayerWalk(decoder, windows.split(batch_size))
    centre = centring(decoder)
    _turn_states(walk, centre)
    first = principal_directions(walk, width)
    _turn_states(walk, first)
    with waiting_beside(target) as waiting:
        last, files = first, {}
        for layer in visit(walk, "slice"):
            last = slice_layer_(layer, centre, last)
            files[layer.name] = waiting / f"{layer.name}.safetensors"
            _save_layer(layer, files[layer.name])

        def shards() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for name, file in progress(files.items(), "write"):
                yield name, load_tensors(file)[0]
            yield from _around_layers(decoder, centre, first, last)

        write_checkpoint(decoder.checkpoint.folder, target, shards(), identity, texts=_texts(decoder, width))


def _save_layer(layer: LoadedLayer, file: Path) -> None:
    parts = layer.module.state_dict().items()
    save_tensors({f"{layer.name}.{key}": part.cpu() for key, part in parts}, file, {})


def slice_layer_(loaded: LoadedLayer, centre: Tensor, before: Tensor) -> Tensor:
    """Slice a loaded layer whose inputs, the walk's states, are in the basis `before` [full width, width].

    Its outputs take the place of the states, in the basis that is returned; centre: see `centring`.
    """
    walk, layer = loaded.walk, loaded.module
    form, width = form_of(walk.decoder.model), before.shape[1]
    norms = {name: layer.get_submodule(name) for name in (form.attention_norm, form.mlp_norm)}
    attention, mlp = layer.get_submodule(form.attention_writer), layer.get_submodule(form.mlp_writer)
    as_sliced_layer_(layer, form, len(centre), width)
    for name in form.attention_readers:
        read_in_(layer.get_submodule(name), norms[form.attention_norm], before)
    # What is written stays as wide as it was until the basis it goes to is known.
    write_in_(attention, centre)
    _set_shortcut(layer, "attention_shortcut", before.T)
    _set_shortcut(layer, "mlp_shortcut", torch.eye(len(centre), dtype=torch.float64, device=centre.device))
    residual = torch.zeros_like(centre)
    with watching_inputs({"": layer.get_submodule(form.mlp_norm)}, lambda _, states: _add_squares_(residual, states)):
        loaded.replay(advance=False)
    middle = _directions(residual, width)
    write_in_(attention, middle)
    _set_shortcut(layer, "attention_shortcut", before.T @ middle)
    for name in form.mlp_readers:
        read_in_(layer.get_submodule(name), norms[form.mlp_norm], middle)
    write_in_(mlp, centre)
    _set_shortcut(layer, "mlp_shortcut", middle.T)
    loaded.replay()
    after = principal_directions(walk, width)
    write_in_(mlp, after)
    _set_shortcut(layer, "mlp_shortcut", middle.T @ after)
    _turn_states(walk, after)
    return after


# --- rotations -------------------------------------------------------------------------------------------------------


def centring(decoder: Decoder) -> Tensor:
    """What a LayerNorm does to its inputs before it divides, I - 11'/n; an RMSNorm does nothing: float64 [n, n].

    Written into what writes to the residual, it makes the one norm the other.
    """
    model, width = decoder.model, decoder.model.config.hidden_size
    identity = torch.eye(width, dtype=torch.float64, device=decoder.device)
    return (
        identity - 1 / width if isinstance(model.get_submodule(form_of(model).final_norm), nn.LayerNorm) else identity
    )


def read_in_(linear: nn.Linear, norm: nn.Module, basis: Tensor) -> None:
    """Let a linear read from `basis` [full width, width] what it read from a norm, whose weights it takes over."""
    weight, shift = linear.weight, getattr(norm, "bias", None)
    if shift is not None:
        bias = _product(weight, shift.double()[:, None], torch.float64)[:, 0]
        bias += 0 if linear.bias is None else linear.bias.double()
        linear.bias = nn.Parameter(bias.to(weight.dtype))
    scaled = basis if norm.weight is None else norm.weight.double()[:, None] * basis
    linear.weight = nn.Parameter(_product(weight, scaled, weight.dtype))
    linear.in_features = basis.shape[1]


def write_in_(module: nn.Linear | nn.Embedding, basis: Tensor) -> None:
    """Let a linear or an embedding write in `basis` [full width, width] what it wrote to the residual."""
    dtype = module.weight.dtype
    if isinstance(module, nn.Embedding):
        module.weight = nn.Parameter(_product(module.weight, basis, dtype))
        return
    module.weight = nn.Parameter(_product(module.weight.T, basis, dtype).T.contiguous())
    module.out_features = basis.shape[1]
    if module.bias is not None:
        module.bias = nn.Parameter((module.bias.double() @ basis).to(dtype))


def _product(weight: Tensor, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [n, m] @ matrix, float64 [m, k], rounded once; of the weight a few rows at a time are in float64."""
    product = torch.empty(len(weight), matrix.shape[1], dtype=dtype, device=weight.device)
    for rows, result in zip(weight.split(ROWS), product.split(ROWS), strict=True):
        result.copy_(rows.double() @ matrix)
    return product


def principal_directions(walk: LayerWalk, width: int) -> Tensor:
    """The `width` directions in which the walk's states [..., n] are largest, largest first: float64 [n, width]."""
    full = walk.states[0].shape[-1]
    covariance = torch.zeros(full, full, dtype=torch.float64, device=walk.decoder.device)
    for states in walk.states:
        _add_squares_(covariance, states)
    return _directions(covariance, width)


def _add_squares_(covariance: Tensor, states: Tensor) -> None:
    """Add X'X, float64 [n, n], of states X [..., n]."""
    tokens = states.flatten(0, -2).to(covariance)
    covariance.addmm_(tokens.T, tokens)


def _directions(covariance: Tensor, width: int) -> Tensor:
    """Its first `width` eigenvectors, largest first, float64 [n, width]; they are found in the place of it, [n, n]."""
    if not covariance.isfinite().all():
        raise UserError("slicegpt: a state on the calibration text is NaN or infinite; so must a weight be")
    # The solver works with further matrices as large.
    give_back_freed()
    vectors = covariance.mT
    torch.linalg.eigh(vectors, out=(covariance.new_empty(len(covariance)), vectors))
    return vectors[:, -width:].flip(1).contiguous()


def _turn_states(walk: LayerWalk, matrix: Tensor) -> None:
    for number, state in enumerate(walk.states):
        walk.states[number] = (state.to(matrix.device).double() @ matrix).to(state)


def _set_shortcut(layer: nn.Module, name: str, matrix: Tensor) -> None:
    dtype = getattr(layer, name).dtype
    setattr(layer, name, nn.Parameter(matrix.to(dtype).contiguous()))


# --- what is not a decoder layer -------------------------------------------------------------------------------------


def _around_layers(
    decoder: Decoder, centre: Tensor, first: Tensor, last: Tensor
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Embeddings in the basis `first`, the head in that of the last layer's outputs, one in memory at a time; anything
    else as it was."""
    model, form = decoder.model, form_of(decoder.model)
    norm, names = model.get_submodule(form.final_norm), {*form.embeddings, form.head}
    load_module(decoder, norm, form.final_norm)
    if form.tied:
        names -= {form.tied, form.head}
        embedding = model.get_submodule(form.tied)
        load_module(decoder, embedding, form.tied)
        yield form.tied, _stored(decoder, _tied(form, embedding.weight, norm, centre, first, last))
        unload(embedding)
    for name in sorted(names):
        module = model.get_submodule(name)
        load_module(decoder, module, name)
        if name == form.head:
            read_in_(module, norm, last)
        else:
            write_in_(module, centre @ first)
        yield name, _stored(decoder, {f"{name}.{key}": part for key, part in module.state_dict().items()})
        unload(module)
    done = tuple(f"{name}." for name in (decoder.layers_name, form.final_norm, form.head, *form.embeddings))
    others = {
        own: decoder.checkpoint.tensors([stored])[stored]
        for own, stored in decoder.stored.items()
        if not own.startswith(done) and own not in model.all_tied_weights_keys
    }
    if others:
        yield REST, _stored(decoder, others)


def _stored(decoder: Decoder, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU and in the checkpoint's type."""
    return {name: tensor.cpu().to(decoder.dtype) for name, tensor in tensors.items()}


def _tied(
    form: Form, embedding: Tensor, norm: nn.Module, centre: Tensor, first: Tensor, last: Tensor
) -> dict[str, Tensor]:
    """The embedding E in the basis `first` and, so that the head can share it, the matrix after the final norm.

    T = E Q_first stands for both; the head's E diag(gamma) Q_last is T M with the M of least squares, exact where
    nothing is cut off. The centring C that a LayerNorm asks for is no part of T: Q' C Q follows it.
    """
    scaled = last if norm.weight is None else norm.weight.double()[:, None] * last
    shift = getattr(norm, "bias", None)
    targets = scaled if shift is None else torch.cat([scaled, shift.double()[:, None]], 1)
    gram, products = first.new_zeros(first.shape[1], first.shape[1]), first.new_zeros(first.shape[1], targets.shape[1])
    table = embedding.new_empty(len(embedding), first.shape[1])
    for part, stored in zip(embedding.split(ROWS), table.split(ROWS), strict=True):
        rows = part.double()
        turned = rows @ first
        stored.copy_(turned)
        gram += turned.T @ turned
        products += turned.T @ (rows @ targets)
    # Of fewer tokens than channels the least squares of least norm.
    solved = torch.linalg.pinv(gram, hermitian=True) @ products
    tensors = {
        f"{form.tied}.weight": table,
        f"{form.final_norm}.1.weight": solved[:, : last.shape[1]].contiguous(),
    }
    if shift is not None:
        tensors[f"{form.final_norm}.1.bias"] = solved[:, -1].contiguous()
    if form.centring:
        tensors[f"{form.centring}.weight"] = first.T @ centre @ first
    return tensors


def _texts(decoder: Decoder, width: int) -> dict[str, str]:
    """What says that the model is sliced, and how."""
    slicing = {"format": FORMAT, "full_width": decoder.model.config.hidden_size, "width": width}
    return {FILE_NAME: json.dumps(slicing, indent=2) + "\n"}
