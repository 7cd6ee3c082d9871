# What the jobs ask for. As a share of Llama-2-7B, since memory and time are written down for that.

LLAMA_2_7B = 13.5e9


def model_size(model):
    """Bytes of the weights of a local model; a hub id counts as Llama-2-7B."""
    if is_gguf(model):
        return 2 * read_gguf_header(Path(model)).parameters  # in bfloat16, as it is imported
    files = [file for file in local_files(model) if file.suffix in (".safetensors", ".bin")]
    return sum(file.stat().st_size for file in files) or LLAMA_2_7B


MODEL_SIZE = model_size(MODEL) / LLAMA_2_7B
# `auto` takes a GPU it finds; only `cuda` has a cluster look for one.
GPUS = int(config["device"] == "cuda")
# Planning and reporting are told of no number.
CORES = workflow.resource_settings.cores or 16
# What rules with much to compute ask for: half the cores, since the iterations and the one-shot run are two chains that
# can go on side by side. A profile's set-threads sets it.
THREADS = max(1, min(8, CORES // 2))
# The priority of what the next step waits for: an evaluation can be made beside it. One after the other, as they come.
ON_THE_WAY = int(CORES > 1 and not GPUS)


def memory(mb):
    """Memory of a job: `mb` for Llama-2-7B, in proportion for others, 3000 at least; each retry gets twice as much."""
    return lambda wildcards, attempt: max(3000, int(mb * MODEL_SIZE)) * 2 ** (attempt - 1)


def minutes(count):
    """Time of a job: `count` for Llama-2-7B on a GPU, in proportion for others; an hour at least, at most a day."""
    return min(max(60, int(count * MODEL_SIZE)), 1440)
