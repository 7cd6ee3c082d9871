# What runs again because something else changed than inputs and configuration: code, texts, the model, tasks.

from functools import partial

code_hash = partial(fingerprints.code_hash, SCRIPTS)


def text_fingerprint(section):
    """What the local files hold that a section of the configuration reads."""
    return fingerprints.text_fingerprint(texts(section), SPLITS_READ[section])


def recovery_text_content(wildcards):
    """What a step is finetuned on, where it is finetuned."""
    return text_fingerprint("recovery") if epochs(wildcards) else []


def method_hash(wildcards):
    """The code of a one-shot method, which its script finds by name: it is not among what the script imports."""
    return code_hash(f"stepdown/prune/methods/{run_of(wildcards).method}.py")
