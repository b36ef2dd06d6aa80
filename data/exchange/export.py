"""Writes a model and its tokenizer as a folder that transformers opens, or a file for llama.cpp.

    python data/exchange/export.py runs/stories/best.pt FOLDER
    python data/exchange/export.py runs/stories/best.pt model.gguf --dtype q8_0

A model that the other side doesn't compute is refused with the reason.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

if __package__ in (None, ""):  # run as a script: let it find lamoe and data, not its neighbours
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from bpe import Tokenizer
from data.exchange.gates import close
from data.exchange.gguf_file import FORMATS, write_gguf
from data.exchange.huggingface import FAMILIES, dense_layers, family_of, hf_tensors, to_hf_config
from data.exchange.load import import_safetensors, load
from data.foreign import tokenizer_files
from data.one_row import is_as_made, way_to_write
from data.run.files import flush_folder
from data.run.flags import OneLineParser, one_line_errors
from data.run.routers import router_name

ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def is_gguf(out) -> bool:
    """Whether this is the name of a file for llama.cpp."""
    return Path(out).suffix.lower() == ".gguf"


def export(
    model, tokenizer, out: str | os.PathLike, shard_bytes=5 * 10**9, dtype="fp32", add_bos=False,
    family: str | None = None,
) -> None:  # fmt: skip
    """Writes a folder that transformers opens: config, weights, and the tokenizer if not None.

    The folder is new or empty, and appears complete: it is written under another name first.
    ValueError if no family of transformers computes what this model does, or if its weights alone
    don't tell (one_row.way_to_write). An `out` that ends in .gguf is a file for llama.cpp instead,
    with its numbers in dtype: see gguf_file.py. add_bos: of tokenizer_files. family: qwen3_next
    (gates.py), or None for the one that is closest.
    """
    folder, c = Path(out), model.config
    if not is_as_made(model):
        remedy = "merge it into the weights, or take it off"
        raise ValueError(f"an adapter, a bias or a hook was put on the model; {remedy}")
    if way_to_write(model) != "row":
        wrong = "lamoe.py or its LaMoE was changed, and no other program computes what it does now"
        raise ValueError(f"{wrong}; keep the checkpoint, beside this lamoe.py")
    if is_gguf(folder):
        return write_gguf(model, tokenizer, folder, dtype)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; name a new folder")
    if tokenizer and tokenizer.vocab_size != c.vocab_size:
        sizes = f"the tokenizer has {tokenizer.vocab_size} ids and the model {c.vocab_size}"
        raise ValueError(f"{sizes}; export them as they were trained")
    safetensors = import_safetensors()
    tensors = hf_tensors(model, asked=family)
    shards = shard(close(tensors, c) if family else tensors, shard_bytes)
    texts = config_files(model, tokenizer, family)
    texts |= tokenizer_files(tokenizer, add_bos) if tokenizer else {}
    if len(shards) > 1:
        size = sum(tensor.nbytes for part in shards.values() for tensor in part.values())
        weight_map = {name: file for file, part in shards.items() for name in part}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        texts["model.safetensors.index.json"] = json.dumps(index, indent=2)
    temporary = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding="utf-8", newline="")
        for name, part in shards.items():
            safetensors.torch.save_file(part, temporary / name, {"format": "pt"})
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        flush_folder(temporary)
        if folder.exists():
            folder.rmdir()
        os.rename(temporary, folder)
        flush_folder(folder.absolute().parent)
    except safetensors.SafetensorError as error:  # its words for a full disk
        raise OSError(f"{folder}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def config_files(model, tokenizer, family: str | None) -> dict[str, str]:
    """{file name: text} of config.json and generation_config.json."""
    c, dense, dtype = model.config, dense_layers(model), model.embed.weight.dtype
    config = {"architectures": [FAMILIES[family_of(c, dense, family)].architecture]}
    config |= to_hf_config(c, dense, family)
    for i in dense:
        width = model.blocks[i].ffn.down_proj.weight.shape[1]
        if width != config["intermediate_size"]:
            reason = f"dense layer {i} is {width} wide, not {config['intermediate_size']}"
            raise ValueError(f"no Hugging Face folder can hold this model: {reason}")
    for key in ("torch_dtype", "dtype"):  # transformers 4 and 5
        config[key] = str(dtype).removeprefix("torch.")
    if n_sparse := len(model.sparse_layers):
        # To train on there with the balance kept. Even routing has a loss of 1 a layer with us, and
        # of top_k for all layers together with them.
        weight = c.balance_weight * n_sparse / c.top_k
        config |= {"output_router_logits": True, "router_aux_loss_coef": round(weight, 12)}
    if tokenizer:
        config["eos_token_id"] = tokenizer.stops if tokenizer.stops[1:] else tokenizer.eot
        config["bos_token_id"] = tokenizer.start[0] if tokenizer.start else None
    if isinstance(tokenizer, Tokenizer):
        config["pad_token_id"] = 255  # the byte that is in no text: see tokenizer_json
    ends = {key: config[key] for key in ENDS if key in config}
    contents = {"config.json": config, "generation_config.json": ends}
    return {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}


def shard(tensors: dict[str, Tensor], limit: int) -> dict[str, dict[str, Tensor]]:
    """{file name: its tensors}, in order, each file at most `limit` bytes (or one tensor)."""
    parts, size = [{}], 0
    for name, tensor in tensors.items():
        if parts[-1] and size + tensor.nbytes > limit:
            parts, size = [*parts, {}], 0
        parts[-1][name], size = tensor, size + tensor.nbytes
    if len(parts) == 1:
        return {"model.safetensors": tensors}
    n = len(parts)
    return {f"model-{i:05}-of-{n:05}.safetensors": part for i, part in enumerate(parts, 1)}


def main() -> None:
    description = "Write a model as a Hugging Face folder, or as a file for llama.cpp."
    parser = OneLineParser("data/exchange/export.py", description=description)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="such as runs/stories/best.pt")
    parser.add_argument("folder", metavar="FOLDER", help="a new folder, or a new file NAME.gguf")
    own = "the model's router, if it is one of your own"
    parser.add_argument("--router", metavar="FILE.py", type=router_name, help=own)
    parser.add_argument("--dtype", choices=[*FORMATS], help="of the weights")
    begin = "tokenizers there begin a text with <|endoftext|>, as prompts do here"
    parser.add_argument("--add_bos", action="store_true", help=begin)
    known = "for vLLM and older transformers; to train on there, leave it out"
    parser.add_argument("--family", choices=["qwen3_next"], help=known)
    args = parser.parse_args()
    if args.dtype == "q8_0" and not is_gguf(args.folder):
        parser.error("--dtype q8_0 is for a file, NAME.gguf; a folder has fp32 or bf16")
    if args.family and is_gguf(args.folder):
        parser.error(f"--family {args.family} is for a folder; leave it out")
    with one_line_errors():
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(args.dtype)  # None: as it is
        model, tokenizer = load(args.checkpoint, dtype=dtype)
        options = {"add_bos": args.add_bos, "family": args.family}
        export(model, tokenizer, args.folder, dtype=args.dtype or "fp32", **options)
    if is_gguf(args.folder):
        return print(f"{args.folder}: llama.cpp, Ollama and LM Studio open it")
    model_type = family_of(model.config, dense_layers(model), args.family)
    architecture = FAMILIES[model_type].architecture
    since = " 5.24 (older 5, and vLLM: --family qwen3_next)" if model_type == "lara_mini" else ""
    opens = f"transformers{since} opens it, and so does sample.py --model"
    print(f"{args.folder}: a {architecture}; {opens}")


if __name__ == "__main__":
    main()
