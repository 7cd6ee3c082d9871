"""Train the bundled model: a small Llama on Python's own documentation, from scratch, in about 20 minutes on 2 cores.

`python resources/pretrain.py` rebuilds `resources/pydoc-llama/`: tokenizer, weights of the best valid loss, model card.
The text is that of the running interpreter (see `stepdown.text`), so another Python gives another model.
"""

import argparse
import itertools
import math
import os
import platform
import sys
import time
from pathlib import Path

# Read when torch is loaded: threads that spin while they wait make a step ten times as slow on shared cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hub_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "workflow" / "scripts"))
from stepdown.text import consecutive_windows, load_documents, token_stream

CARD = """\
---
license: psf-2.0
language: en
pipeline_tag: text-generation
---
# pydoc-llama

A small Llama ({parameters:,} parameters: hidden 256, FFN 688, 6 layers, 4 heads on 2 key-value heads,
vocabulary {vocabulary:,}, tied embeddings) that knows nothing but Python's own documentation. It is here so that the
pipeline has something real to prune with no download: it is trained well enough that pruning hurts and finetuning
heals, and good for nothing else.

* **Data**: the `pydoc` text of stepdown, taken from the interpreter itself (Python {python}): the topics of `help()`
  and the docstrings of the standard library, each long paragraph once, split by document.
  In tokens: train {train_tokens:,}, valid {valid_tokens:,}, test {test_tokens:,}.
* **Tokenizer**: byte-level BPE trained on the train split; adds no special tokens by itself.
* **Command**: `{command}`: {epochs} epochs of windows of {length} tokens, Muon (AdamW for the
  embeddings), peak learning rate {learning_rate:g}, the weights of the best valid loss, rounded to bfloat16.
* **Perplexity per token**, non-overlapping windows of {length}, float32 arithmetic on the rounded weights:
  valid **{valid_perplexity:.2f}**, test **{test_perplexity:.2f}** (train {train_perplexity:.2f}).
* **Licence**: the text is the documentation of Python, copyright Python Software Foundation, under the PSF License
  Version 2; the model is derived from it alone and given under the same terms.
"""


def main(arguments: argparse.Namespace) -> None:
    """Tokenizer, training, and at the end the model card with what was measured on the model as saved."""
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    documents = {split: load_documents("pydoc", split) for split in ("train", "valid", "test")}
    tokenizer = train_tokenizer(documents["train"], arguments.vocabulary)
    tokenizer.save_pretrained(arguments.output)
    streams = {split: token_stream(documents[split], tokenizer) for split in documents}
    model = new_model(tokenizer)
    train(model, streams, arguments)
    write_card(streams, arguments)


def train_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocabulary` entries: every text round-trips, nothing is unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The architecture with random weights."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model: LlamaForCausalLM, streams: dict[str, torch.Tensor], arguments: argparse.Namespace) -> None:
    """Warm-up and cosine decay; saves at every best valid loss, so that a stopped run leaves a model."""
    add_dropout(model, arguments.dropout)
    valid = consecutive_windows(streams["valid"], arguments.length)
    batches = list(shuffled_batches(streams["train"], arguments))
    optimizers = new_optimizers(model, arguments)
    best, start = math.inf, time.perf_counter()
    bar = tqdm(batches, desc="pretrain", dynamic_ncols=True, mininterval=5)
    for step, batch in enumerate(bar, start=1):
        for group in itertools.chain(*(optimizer.param_groups for optimizer in optimizers)):
            group["lr"] = learning_rate(step, len(batches), arguments)
        loss = training_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % arguments.evaluate_every == 0 or step == len(batches):
            perplexity = perplexity_of(model, valid)
            minutes = (time.perf_counter() - start) / 60
            bar.write(f"step {step}: loss {loss.item():.3f}, valid perplexity {perplexity:.2f}, {minutes:.1f} min")
            if perplexity < best:
                best = perplexity
                save(model, arguments.output)


def add_dropout(model: LlamaForCausalLM, share: float) -> None:
    """Dropout on what each attention and each FFN adds: many epochs over a small text would overfit."""

    def drop(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        # One mask for all positions of a window: drawing one per position is serial, and a tenth of the step.
        return output * torch.nn.functional.dropout(torch.ones_like(output[:, :1]), share, module.training)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)


def shuffled_batches(stream: torch.Tensor, arguments: argparse.Namespace):
    """Batches `[batch, length]` of all epochs; every epoch cuts its windows at another offset."""
    generator = torch.Generator().manual_seed(arguments.seed)
    for _ in range(arguments.epochs):
        offset = int(torch.randint(arguments.length, (), generator=generator))
        windows = consecutive_windows(stream[offset:], arguments.length)
        windows = windows[torch.randperm(len(windows), generator=generator)]
        yield from windows[: len(windows) // arguments.batch * arguments.batch].split(arguments.batch)


def new_optimizers(model: LlamaForCausalLM, arguments: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embeddings and the gains of the norms.

    On this little text Muon needs half the steps AdamW needs everywhere, at a third more time a step.
    """
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if all(parameter is not matrix for matrix in matrices)]
    return [
        torch.optim.Muon(matrices, weight_decay=arguments.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def learning_rate(step: int, steps: int, arguments: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step <= arguments.warmup:
        return arguments.learning_rate * step / arguments.warmup
    done = (step - arguments.warmup) / (steps - arguments.warmup)
    return arguments.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)


def training_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss; bfloat16 arithmetic, 1.6 times as fast as float32 on a CPU with AVX-512 BF16."""
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=batch, labels=batch, use_cache=False).loss


@torch.no_grad()
def perplexity_of(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    """Perplexity per token over windows `[windows, length]`, in the model's own precision."""
    model.eval()
    losses = [model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part) for part in windows.split(8)]
    return math.exp(sum(losses) / len(windows))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """The weights in bfloat16, half the size; the model that trains on keeps its float32."""
    weights = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    rounded = LlamaForCausalLM(model.config).bfloat16()
    rounded.load_state_dict(weights)
    rounded.save_pretrained(folder)


def write_card(streams: dict[str, torch.Tensor], arguments: argparse.Namespace) -> None:
    """Measure the saved model, loaded the way a user loads it, and write `README.md`."""
    model = AutoModelForCausalLM.from_pretrained(arguments.output, dtype=torch.float32)
    measured = {}
    for split, stream in streams.items():
        measured[f"{split}_tokens"] = len(stream)
        measured[f"{split}_perplexity"] = perplexity_of(model, consecutive_windows(stream, arguments.length))
        print(f"{split}: {len(stream)} tokens, perplexity {measured[f'{split}_perplexity']:.2f}")
    card = CARD.format(
        parameters=model.num_parameters(),
        vocabulary=len(AutoTokenizer.from_pretrained(arguments.output)),
        python=platform.python_version(),
        command=" ".join(["python resources/pretrain.py", *sys.argv[1:]]),
        epochs=arguments.epochs,
        length=arguments.length,
        learning_rate=arguments.learning_rate,
        **measured,
    )
    (arguments.output / "README.md").write_text(card, encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    here = Path(__file__).resolve().parent
    parser.add_argument("--output", type=Path, default=here / "pydoc-llama", help="folder of the model")
    parser.add_argument("--epochs", type=int, default=8, help="passes over the train split")
    parser.add_argument("--batch", type=int, default=8, help="windows per step")
    parser.add_argument("--length", type=int, default=256, help="tokens per window")
    parser.add_argument("--vocabulary", type=int, default=4096, help="entries of the tokenizer")
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="peak")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--dropout", type=float, default=0.1, help="on what every attention and FFN adds")
    parser.add_argument("--evaluate-every", type=int, default=200, help="steps between valid losses")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    hub_logging.disable_progress_bar()
    main(parse_arguments())
