"""The form of a sliced model (SliceGPT, Ashkboos et al. 2024): a Hugging Face model whose residual is narrower.

Its norms have no weights any more and divide by the width they had; between attention and MLP, and between layers, the
residual is turned from one basis into the next by a shortcut matrix. `decoder.load_whole` reads such a model.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError

FILE_NAME = "slicing.json"
FORMAT = "stepdown sliced 1"


@dataclass(frozen=True)
class Form:
    """Where a family's model touches the residual, by names of modules; those of a layer go by their names inside it.

    Readers take their inputs from a norm of the residual, writers add their outputs to it. mlp: the MLP of a layer;
    tied: the embedding of tokens where the head has the same weights; centring: where what it gives can be centred.
    """

    attention_norm: str
    attention_readers: tuple[str, ...]
    attention_writer: str
    mlp_norm: str
    mlp_readers: tuple[str, ...]
    mlp_writer: str
    mlp: Callable[[nn.Module, Tensor], Tensor]
    embeddings: tuple[str, ...]
    final_norm: str
    head: str
    tied: str = ""
    centring: str = ""


def form_of(model: nn.Module) -> Form:
    """The form of a model of one of the families `compressions.SLICEABLE`."""
    attention_readers = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    tied = model.config.tie_word_embeddings
    if model.config.model_type != "opt":
        return Form(
            attention_norm="input_layernorm",
            attention_readers=attention_readers,
            attention_writer="self_attn.o_proj",
            mlp_norm="post_attention_layernorm",
            mlp_readers=("mlp.gate_proj", "mlp.up_proj"),
            mlp_writer="mlp.down_proj",
            mlp=lambda layer, inputs: layer.mlp(inputs),
            embeddings=("model.embed_tokens",),
            final_norm="model.norm",
            head="lm_head",
            tied="model.embed_tokens" if tied else "",
        )
    # Where embeddings are narrower than the residual, project_in writes to it, project_out reads: what is tied stays.
    projected = model.config.word_embed_proj_dim != model.config.hidden_size
    return Form(
        attention_norm="self_attn_layer_norm",
        attention_readers=attention_readers,
        attention_writer="self_attn.out_proj",
        mlp_norm="final_layer_norm",
        mlp_readers=("fc1",),
        mlp_writer="fc2",
        mlp=lambda layer, inputs: layer.fc2(layer.activation_fn(layer.fc1(inputs))),
        embeddings=(f"model.decoder.{'project_in' if projected else 'embed_tokens'}", "model.decoder.embed_positions"),
        final_norm="model.decoder.final_layer_norm",
        head="model.decoder.project_out" if projected else "lm_head",
        tied="model.decoder.embed_tokens" if tied and not projected else "",
        centring="" if projected else "model.decoder.project_in",
    )


class SlicedNorm(nn.Module):
    """x / sqrt(||x||^2 / full_width + eps): an RMSNorm without weights over the width before slicing; a LayerNorm too,
    since what writes to the residual has mean zero."""

    def __init__(self, full_width: int, eps: float):
        super().__init__()
        self.full_width, self.eps = full_width, eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        wide = hidden_states.float()
        squares = wide.square().sum(-1, keepdim=True) / self.full_width
        return (wide * torch.rsqrt(squares + self.eps)).to(hidden_states.dtype)


class SlicedLayer(nn.Module):
    """The forward pass of a decoder layer whose residual is turned on its way; `attention_shortcut` and `mlp_shortcut`
    are [width before, width after]."""

    form: Form

    def forward(self, hidden_states: Tensor, **call) -> Tensor:
        normed = self.get_submodule(self.form.attention_norm)(hidden_states)
        attended, _ = self.self_attn(hidden_states=normed, **call)
        hidden_states = hidden_states @ self.attention_shortcut + attended
        normed = self.get_submodule(self.form.mlp_norm)(hidden_states)
        return hidden_states @ self.mlp_shortcut + self.form.mlp(self, normed)


def as_sliced_layer_(layer: nn.Module, form: Form, full_width: int, width: int) -> None:
    """Give a decoder layer the forward pass and the norms of a sliced one; its matrices stay as they are.

    It stays an instance of its own class, as models ask their layers for more than a forward pass.
    """
    layer.__class__ = type(f"Sliced{type(layer).__name__}", (SlicedLayer, type(layer)), {"form": form})
    for name in (form.attention_norm, form.mlp_norm):
        _replace_norm(layer, name, full_width)
    dtype = next(layer.parameters()).dtype
    for name in ("attention_shortcut", "mlp_shortcut"):
        setattr(layer, name, nn.Parameter(torch.empty(width, width, dtype=dtype, device="meta")))


def as_sliced_(model: nn.Module, layers: nn.ModuleList, width: int) -> None:
    """Give a model on the meta device the form that `width` of its hidden size makes of it, which `save_pretrained`
    has no words for."""
    model.save_pretrained = _refuse_to_save
    form, full_width = form_of(model), model.config.hidden_size
    # A shift that a norm adds becomes a bias of those that read from it.
    shifted = getattr(model.get_submodule(form.final_norm), "bias", None) is not None
    for layer in layers:
        as_sliced_layer_(layer, form, full_width, width)
        for name in (*form.attention_readers, *form.mlp_readers):
            _resize(layer.get_submodule(name), inputs=width, bias=shifted)
        for name in (form.attention_writer, form.mlp_writer):
            _resize(layer.get_submodule(name), outputs=width)
    for name in form.embeddings:
        _resize(model.get_submodule(name), outputs=width)
    _replace_norm(model, form.final_norm, full_width)
    _resize(model.get_submodule(form.head), inputs=width, bias=shifted and not form.tied)
    if form.tied:
        add_matrices_to_tied_(model, form, width, shifted)


def add_matrices_to_tied_(model: nn.Module, form: Form, width: int, shifted: bool) -> None:
    """Let a head keep the weights of the embedding, whose basis is another: after the final norm comes a matrix that
    turns into it. An embedding that must be centred, while the head has its weights, is centred by a matrix of its own.
    """
    turn = nn.Linear(width, width, bias=shifted, device="meta", dtype=model.dtype)
    model.set_submodule(form.final_norm, nn.Sequential(model.get_submodule(form.final_norm), turn))
    if form.centring:
        centre = nn.Linear(width, width, bias=False, device="meta", dtype=model.dtype)
        parent, _, own = form.centring.rpartition(".")
        setattr(model.get_submodule(parent), own, centre)


def _refuse_to_save(*_: object, **__: object) -> None:
    raise UserError("a sliced model is not saved anew: no loader would know its form; copy its folder")


def read_width(folder: Path | str) -> int | None:
    """Width of the residual in a sliced folder, None in any other; raises `UserError` for a file of another kind."""
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        return None
    try:
        slicing = json.loads(path.read_text(encoding="utf-8"))
        assert slicing["format"] == FORMAT
        return int(slicing["width"])
    except (ValueError, KeyError, TypeError, AssertionError):
        raise UserError(f"{path}: does not tell how the model was sliced ({FORMAT!r}); make it again") from None


def _resize(module: nn.Module, inputs: int | None = None, outputs: int | None = None, bias: bool = False) -> None:
    """A linear or an embedding of other sizes in place; `bias`: one is added where there is none."""
    if isinstance(module, nn.Embedding):
        module.weight = nn.Parameter(module.weight.new_empty(len(module.weight), outputs))
        module.embedding_dim = outputs
        return
    module.in_features, module.out_features = inputs or module.in_features, outputs or module.out_features
    module.weight = nn.Parameter(module.weight.new_empty(module.out_features, module.in_features))
    if bias or module.bias is not None:
        module.bias = nn.Parameter(module.weight.new_empty(module.out_features))


def _replace_norm(module: nn.Module, name: str, full_width: int) -> None:
    norm = module.get_submodule(name)
    eps = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
    module.set_submodule(name, SlicedNorm(full_width, eps))
