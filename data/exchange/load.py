"""Reads a model from our checkpoint or from a Hugging Face folder, one tensor at a time.

A folder may be a stranger's: what its files claim is checked before memory is reserved for it, and
every mistake ends in one line that names the folder and the cause.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor

import lamoe
from data import one_row
from data.exchange.gates import without_gates
from data.exchange.granite import take_factors, with_factors
from data.exchange.huggingface import (
    FAMILIES,
    as_stored,
    asked_of,
    dense_layers,
    family_of,
    from_hf_config,
    hf_tensors,
)
from data.foreign import load_tokenizer
from data.run import checkpoint


def load(path: str | os.PathLike, device: str = "cpu", dtype: torch.dtype | None = None):
    """(model in evaluation mode, tokenizer or None) from a checkpoint or a Hugging Face folder.

    dtype: of the weights, torch.float32 or torch.bfloat16; None: as a folder stores them, and fp32
    of a checkpoint. A router stored in fp32 stays so, for it computes in fp32 anyway. From now on a
    CPU writes with data/one_row.py.
    """
    one_row.use()
    if os.path.isdir(path):
        model, tokenizer = load_folder(Path(path), device, dtype)
        checkpoint.check_finite(model, path)
        return model, tokenizer
    model, tokenizer = checkpoint.build(checkpoint.read(path), path)
    for name, weight in model.named_parameters():
        if dtype is not None and "router" not in name.split("."):
            weight.data = weight.data.to(dtype)
    return model.to(device).eval(), tokenizer


def load_folder(folder: Path, device: str, dtype: torch.dtype | None):
    """`load` for a Hugging Face folder. One tensor at a time is in memory besides the model."""
    is_run = (folder / "log.csv").exists()  # beside it is another config.json
    if is_run or not (folder / "config.json").exists():
        reason = "neither a readable checkpoint nor a Hugging Face folder: it has no config.json"
        remedy = f"name a .pt file, such as {folder}/best.pt"
        if is_run:
            reason = "the folder of a run, not a checkpoint"
        elif (folder / "params.json").exists():
            reason, script = "in Meta's own layout", "models.llama.convert_llama_weights_to_hf"
            remedy = f"convert it (transformers 4): python -m transformers.{script}"
            remedy += f" --input_dir {folder} --output_dir NEW_FOLDER"
        raise ValueError(f"{folder} is {reason}; {remedy}")
    try:
        theirs, files = read_json(folder / "config.json"), open_tensors(folder)
        plain, factors = take_factors(theirs)
        (c, dense), asked = from_hf_config(plain, no_shared(files)), asked_of(plain)
        files = without_gates(files, c) if asked else files
        files = with_factors(files, factors) if factors else files
        model = reserve(c, dense, files, device, dtype, asked)
        for name, weight in hf_tensors(model, files, asked).items():
            weight.copy_(files[name].get_tensor(name))
    except KeyError as error:
        raise ValueError(f"{folder} can't be read: it lacks {error}") from error
    except Exception as error:  # those of safetensors and torch have no common class
        reason = " ".join(f"{error}".split())[:300]
        remedy = "" if isinstance(error, ValueError) else "; is all of it there? copy it again"
        raise ValueError(f"{folder} can't be read: {reason}{remedy}") from error
    return model, load_tokenizer(folder, c.vocab_size, theirs.get("eos_token_id"))


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is no JSON ({error}); copy it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is no JSON object")
    return content


def import_safetensors():
    """The package, or ValueError with the command that installs it."""
    try:
        import safetensors.torch

        safetensors.TensorSpec  # noqa: B018  what 0.8 brought, together with the backend "pread"
    except (ImportError, AttributeError):
        raise ValueError('Hugging Face folders need: pip install "safetensors>=0.8"') from None
    return safetensors


def open_tensors(folder: Path) -> dict:
    """{name of a tensor: the open file that holds it}, from one file or the shards of an index."""
    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if not (folder / names[0]).exists() and index.exists():
        names = sorted({Path(name).name for name in read_json(index)["weight_map"].values()})
    elif not (folder / names[0]).exists() and [*folder.glob("pytorch_model*.bin")]:
        raise ValueError(
            'its weights are in pytorch_model.bin; convert them: python -c "from transformers '
            f"import AutoModelForCausalLM as M; "
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    safe_open = import_safetensors().safe_open
    # pread: by default files are mapped, and would be in memory beside the weights
    files = [safe_open(folder / name, "pt", backend="pread") for name in names]
    return {name: file for file in files for name in file.keys()}


def no_shared(files: dict) -> bool:
    """Whether there are shared experts, and all of them zeros: as for a model without any."""
    names = [name for name in files if ".mlp.shared_experts." in name]
    return bool(names) and not any(files[name].get_tensor(name).any() for name in names)


class NoInit(torch.overrides.TorchFunctionMode):
    """Inside, weights get no first values: those about to be read would only lose time on them."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"]
        return args[0] if function is Tensor.zero_ else function(*args, **(kwargs or {}))


def reserve(c: lamoe.Config, dense: list[int], files: dict, device, dtype, asked) -> lamoe.LaMoE:
    """A model for the tensors in these files, which are not read yet; dtype as for `load`."""
    family = as_stored(FAMILIES[family_of(c, dense, asked)], files)
    is_apart = len(family.parts) == 3 and not family.is_stacked
    if c.n_layers * (c.n_experts if is_apart else 1) > len(files):
        raise ValueError(f"{c.n_layers} layers of {c.n_experts} experts are not in its files")
    stored = {name: file.get_slice(name).get_dtype() for name, file in files.items()}
    is_bf16 = stored["model.embed_tokens.weight"] == "BF16"
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or (torch.bfloat16 if is_bf16 else torch.float32))
    try:
        with torch.device(device), NoInit():
            model = lamoe.LaMoE(c).to(device).eval()  # to: RoPE's tables are made on the CPU
    finally:
        torch.set_default_dtype(before)
    if c.n_experts > 1 and dense_layers(model) != dense:
        raise ValueError(f"mlp_only_layers={dense} is not supported, only {dense_layers(model)}")
    for i in model.sparse_layers:  # a router computes in fp32: if stored so, it stays so
        router, name = model.blocks[i].ffn.router, f"{family.ffn}.{family.router}.weight"
        if stored.get(f"model.layers.{i}.{name}") == "F32":
            router.float()
        for name, buffer in router.named_buffers():  # a bias moves in steps too small for bf16
            setattr(router, name, buffer.float())
    check_tensors(hf_tensors(model, files, asked), files, c.tie_embeddings)
    return model


def check_tensors(expected: dict[str, Tensor], files: dict, tied: bool) -> None:
    """ValueError names tensors that are missing, not known, or of another shape than config's."""
    known = {name for name in files if name.endswith("rotary_emb.inv_freq")}  # of old files
    known |= {"lm_head.weight"} if tied else set()  # a copy of the embedding
    missing, more = expected.keys() - files.keys(), files.keys() - expected.keys() - known
    for word, names in (("lacks", missing), ("has unexpected", more)):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ValueError(f"it {word} {len(names)} tensors: {some}{', ...' * (len(names) > 3)}")
    for name, tensor in expected.items():
        stored = files[name].get_slice(name)
        if stored.get_shape() != [*tensor.shape]:
            raise ValueError(f"{name} is {stored.get_shape()}, by its config {[*tensor.shape]}")
        if stored.get_dtype() not in ("F64", "F32", "BF16", "F16"):
            raise ValueError(f"{name} is in {stored.get_dtype()}; only floats are read, F16 to F64")
