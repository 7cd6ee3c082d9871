"""Continue a prompt with a packed model and with the same weights dense in torch: the text, and how fast each came.

python workflow/scripts/generate.py --model results/iter5/packed/bf16 --prompt "Return the length of"
"""

import argparse
import time

import torch

from stepdown import cli
from stepdown.errors import UserError
from stepdown.files import SURROGATE, check_length
from stepdown.measure.speed import memory_of
from stepdown.packed.folder import read_index
from stepdown.packed.linear import KERNELS
from stepdown.packed.model import load_packed


def main(arguments: argparse.Namespace) -> None:
    from stepdown.models.loading import load_tokenizer

    if arguments.tokens < 1 or not arguments.prompt:
        raise UserError("--tokens must be 1 or more, and --prompt must not be empty")
    # Of another folder only the tokenizer would be missed.
    read_index(arguments.model)
    tokenizer = load_tokenizer(arguments.model, arguments.trust_remote_code)
    prompt = tokenizer(SURROGATE.sub("\ufffd", arguments.prompt), return_tensors="pt")
    check_length("--prompt with --tokens", prompt["input_ids"].shape[1] + arguments.tokens, arguments.model)
    options = {"device": arguments.device, "trust_remote_code": arguments.trust_remote_code}
    texts = {}
    # One after the other, so that only one of them is in memory.
    for name, kernel in (("packed", arguments.kernel), ("dense in torch", "torch")):
        model = load_packed(arguments.model, kernel, **options)
        tokens, speed = continue_prompt(model, prompt, arguments.tokens)
        texts[name] = tokenizer.decode(tokens, skip_special_tokens=True)
        if len(texts) == 1:
            print(f"{texts[name]}\n")
        print(f"{name + ':':16}{speed:8.1f} tokens/s")
        del model
    print("the same text" if len(set(texts.values())) == 1 else f"dense in torch goes on otherwise:\n{texts[name]}")


def continue_prompt(model: torch.nn.Module, prompt: dict, count: int) -> tuple[torch.Tensor, float]:
    """Greedy tokens, prompt included, int64 [tokens], and new tokens per second, the prompt's own time included."""
    inputs = {name: tensor.to(model.device) for name, tensor in prompt.items() if name != "token_type_ids"}
    # What happens once only, such as compiling for a GPU, is not counted.
    greedy(model, inputs, 2)
    start = time.perf_counter()
    tokens = greedy(model, inputs, count)[0].cpu()
    seconds = time.perf_counter() - start
    return tokens, (len(tokens) - inputs["input_ids"].shape[1]) / seconds


@torch.no_grad()
def greedy(model: torch.nn.Module, inputs: dict, count: int) -> torch.Tensor:
    """A prompt and up to `count` tokens more, int64 [1, tokens], as `model.generate`, which takes over a millisecond
    more for each, has them where generation_config.json changes no logits."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    tokens, output = inputs["input_ids"], model(**inputs, use_cache=True)
    for number in range(1, count + 1):
        token = output.logits[:, -1:].argmax(-1)
        tokens = torch.cat([tokens, token], dim=1)
        if number == count or token.item() in ends:
            break
        memory = memory_of(output)
        output = model(input_ids=token if memory else tokens, use_cache=True, **memory)
    return tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_model_arguments(parser)
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens at most (default: %(default)s)")
    parser.add_argument("--kernel", choices=["auto", *KERNELS], default="auto", help="default: %(default)s")
    cli.run(main, parser)
