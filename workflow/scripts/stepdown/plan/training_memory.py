"""What a training holds in the memory of a GPU, by part, and what to change where there is less. Standard library only.

What weights, gradients and moments take follows from their number; of activations and logits the most that is held at
once was measured on Llamas, which the others are taken to be like.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UserError
from ..files import has_only_pickles, read_json_object, safetensors_header, weight_files

# Bytes a weight: of itself, its gradient, AdamW's two moments, its mask, and the copy autocast computes with.
WEIGHT = {"full": 4, "low": 2}
GRADIENT = {"full": 4, "low": 2}
MOMENTS = {"full": 8, "low": 4}
MASK = {"full": 1, "low": 1 / 8}
CAST = {"full": 2, "low": 0}
TEACHER = 2
# Bytes a token: of what waits between two checkpointed layers, by hidden size; of a layer's activations, by hidden and
# by intermediate size; and of the logits, gradients and the teacher's among them, by vocabulary.
STATE = {"full": 4, "low": 2}
ACTIVATIONS = {"full": {"full": (58, 8), "low": (26, 8)}, "lora": {"full": (33, 8), "low": (4, 8)}}
LOGITS = {"full": 14, "low": 8}
# What losses and optimizer compute with in float32, a chunk at a time.
CHUNKS = 2**27
# Of an adapter's weights: themselves, gradients and moments in float32.
ADAPTER = 16
# How far what is computed here may be from what is held.
TOLERANCE = 0.1
MORE_PROCESSES = (2, 4, 8, 16, 32, 64)
# The sizes of a layer, by the names that families give them.
SIZES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "vocabulary": ("vocab_size",),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim"),
}
# Of a layer of experts: what one makes of a token, to how many a token goes, and how many see all tokens.
EXPERT_SIZES = ("moe_intermediate_size", *SIZES["intermediate"])
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


@dataclass(frozen=True)
class ModelSize:
    """Numbers of weights: all of them, and those of the matrices in decoder layers; and the sizes of a layer."""

    parameters: int
    matrices: int
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int


@dataclass(frozen=True)
class TrainingPlan:
    """What of the settings of `recovery` memory depends on; batch_size: windows of sequence_length tokens."""

    method: str
    memory: str
    batch_size: int
    sequence_length: int
    processes: int = 1
    sharded: bool = False
    gradient_checkpointing: bool = False
    distilled: bool = True
    lora_rank: int = 8


def training_bytes(model: ModelSize, plan: TrainingPlan) -> dict[str, int]:
    """Bytes that each process holds at the peak of a training step, by part."""
    low, lora = plan.memory, plan.method == "lora"
    shards = plan.processes if plan.sharded else 1
    trained = 0 if lora else model.parameters
    tokens = plan.batch_size * plan.sequence_length
    head = model.vocabulary * model.hidden
    layer = model.matrices / model.layers
    adapters = lora * plan.lora_rank * model.layers * (8 * model.hidden + 3 * (model.hidden + model.intermediate))
    copies = trained * GRADIENT[low] if plan.processes > 1 and not plan.sharded else 0
    whole = (2 * layer + 2 * head) * (WEIGHT[low] + TEACHER * plan.distilled) if shards > 1 else 0
    parts = {
        "weights": model.parameters * WEIGHT[low] / shards,
        "teacher": model.parameters * TEACHER * plan.distilled / shards,
        # An adapter's are no parameters: each process has all of them.
        "masks": model.matrices * MASK[low] / (1 if lora else shards),
        "gradients": trained * GRADIENT[low] / shards + copies,
        "moments": trained * MOMENTS[low] / shards,
        "adapters": adapters * ADAPTER / shards,
        "layers made whole": whole,
        "activations": _activations(model, plan, tokens),
        "computing": _loss_or_layer(model, plan, tokens) + CHUNKS,
    }
    return {part: math.ceil(held) for part, held in parts.items()}


def _activations(model: ModelSize, plan: TrainingPlan, tokens: int) -> float:
    """What all layers keep for their gradients."""
    if plan.gradient_checkpointing:
        return model.layers * tokens * model.hidden * STATE[plan.memory]
    # W + B A, and bytes of masks that are held as bits.
    merged = (3 - MASK[plan.memory]) * model.matrices if plan.method == "lora" else 0
    return model.layers * _layer(model, plan, tokens) + merged


def _layer(model: ModelSize, plan: TrainingPlan, tokens: int) -> float:
    by_hidden, by_intermediate = ACTIVATIONS[plan.method][plan.memory]
    return tokens * (by_hidden * model.hidden + by_intermediate * model.intermediate)


def _loss_or_layer(model: ModelSize, plan: TrainingPlan, tokens: int) -> float:
    """What is held while the loss is computed, or a layer once more: the larger; never at once.

    Autocast keeps its copies of weights until the loss is there, of a model in shards those of a layer alone.
    """
    vocabulary = tokens * model.vocabulary
    cast = 0 if plan.method == "lora" else model.matrices / (model.layers if plan.sharded else 1)
    forward = CAST[plan.memory] * (cast + model.vocabulary * model.hidden + 3 * vocabulary)
    logits = LOGITS[plan.memory] * vocabulary
    again = _layer(model, plan, tokens) if plan.gradient_checkpointing else 0
    if plan.method == "lora":
        # B A and W + B A of a matrix, in float32, and those of the layer as they are multiplied with.
        again += 8 * model.hidden * model.intermediate + 2 * model.matrices / model.layers
    return max(forward, logits, again)


def read_model_size(folder: Path) -> ModelSize | None:
    """The size of the model of a folder, or None where its files do not tell."""
    if has_only_pickles(folder):
        return None
    config = read_json_object(folder / "config.json")
    text_config = config.get("text_config")
    config |= text_config if isinstance(text_config, dict) else {}
    sizes = {size: _first(config, names) for size, names in SIZES.items()}
    sizes["intermediate"] = sizes["intermediate"] or 4 * sizes["hidden"]
    if experts := _intermediate_of_experts(config):
        sizes["intermediate"] = experts
    shapes = [
        entry["shape"]
        for file in weight_files(folder)
        for name, entry in safetensors_header(file)[0].items()
        if name != "__metadata__"
    ]
    if not shapes or not all(isinstance(size, int) and size > 0 for size in sizes.values()):
        return None
    vocabularies = sum(math.prod(shape) for shape in shapes if len(shape) == 2 and shape[0] == sizes["vocabulary"])
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1) - vocabularies
    return ModelSize(sum(map(math.prod, shapes)), matrices, **sizes)


def _first(config: dict, names: tuple[str, ...]) -> int:
    return next((config[name] for name in names if config.get(name)), 0)


def _intermediate_of_experts(config: dict) -> int:
    """What all experts together make of a token; 0 where a config names none."""
    size, chosen, shared = (_first(config, names) for names in (EXPERT_SIZES, EXPERTS_OF_A_TOKEN, SHARED_EXPERTS))
    own = _first(config, ("shared_expert_intermediate_size",))
    if not chosen or not all(isinstance(number, int) for number in (size, chosen, shared, own)):
        return 0
    return size * (chosen + shared) + own


def check_memory(model: ModelSize, plan: TrainingPlan, found: int) -> None:
    """Raises `UserError` for a training that cannot fit into `found` bytes of each GPU, and says what to change."""
    needed = sum(training_bytes(model, plan).values())
    if needed * (1 - TOLERANCE) > found:
        raise UserError(
            f"recovery: training takes {needed / 1e9:.1f} GB of a GPU, there are {found / 1e9:.1f}: "
            + advice(model, plan, found)
        )


def advice(model: ModelSize, plan: TrainingPlan, found: int) -> str:
    """The least that must change for a training to fit into `found` bytes of each GPU."""
    less = {
        "gradient_checkpointing: true": {"gradient_checkpointing": True},
        "memory: low": {"memory": "low"},
        "batch_size: 1": {"batch_size": 1},
        "method: lora": {"method": "lora"},
    }
    for processes in MORE_PROCESSES:
        less[f"processes: {processes}, sharded: true"] = {"processes": processes, "sharded": True}
    told = []
    for words, change in less.items():
        if plan.processes <= change.get("processes", plan.processes) and replace(plan, **change) != plan:
            plan = replace(plan, **change)
            told = [each for each in told if not each.startswith("processes")] + [words]
            if sum(training_bytes(model, plan).values()) <= found:
                return "set " + ", ".join(told)
    return "no setting brings it down to that"
