"""Tokens a second of one text written on a CPU, greedily: LaMoE and others, from the same weights.

    python tests/bench_writing.py              minutes: the default model and one of 38M parameters
    python tests/bench_writing.py --smallest   seconds: whether it runs, not how fast

The others read what data/exchange/export.py writes: Hugging Face a folder, llama.cpp (in the wheel
xllamacpp) a file in fp32. All take turns, round by round; medians count. Beside other processes
compare the ratios alone, and those of one thread.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice, product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from data.exchange import export  # isort: skip (before torch: see data/__init__.py)
import torch

import lamoe
from bpe import Tokenizer
from data import one_row
from data.run.machine import has_compiler

DEFAULT = {"vocab_size": 2048, "n_layers": 3, "qk_norm": True}
LARGER = {"vocab_size": 8192, "dim": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6}
LARGER |= {"n_experts": 8, "hidden_dim": 512, "qk_norm": True}
PROMPT = torch.arange(16)[None]


def make(shape: dict) -> lamoe.LaMoE:
    torch.manual_seed(0)
    model = lamoe.LaMoE(lamoe.Config(**shape)).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return model


def ours(model, n: int, step=one_row.RowStep, **options) -> list[int]:
    lamoe.Step = step
    return [ids_B.item() for ids_B in model.generate(PROMPT, n, temperature=0.0, **options)]


def hugging_face(folder: Path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(PROMPT), "do_sample": False, "pad_token_id": 0}
    return lambda n: model.generate(PROMPT, max_new_tokens=n, **options)[0, 16:].tolist()


def llama_cpp(file: Path):
    import numpy as np
    from test_gguf import Llama, ctypes

    llama = Llama(file)
    vocab_size, n32 = llama.vocab_size, ctypes.c_int32
    set_threads = llama.function("llama_set_n_threads", None, ctypes.c_void_p, n32, n32)
    memory = llama.function("llama_get_memory", ctypes.c_void_p, ctypes.c_void_p)(llama.context)
    clear = llama.function("llama_memory_clear", None, ctypes.c_void_p, ctypes.c_bool)

    def write(n: int) -> list[int]:
        threads, ids = torch.get_num_threads(), PROMPT[0].tolist()
        set_threads(llama.context, threads, threads)
        clear(memory, False)
        for at in range(15 + n):
            assert llama.decode(llama.context, llama.batch((n32 * 1)(ids[at]), 1)) == 0
            if at >= 15:
                logits_V = np.ctypeslib.as_array(llama.last(llama.context, -1), (vocab_size,))
                ids.append(int(logits_V.argmax()))
        return ids[16:]

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smallest", action="store_true", help="to see whether it runs")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    models = {"default, 1.9M": (DEFAULT, 200), "38M": (LARGER, 100)}
    if args.smallest:
        models, args.rounds = {"smallest": ({**DEFAULT, "n_layers": 1}, 5)}, 1
    for name, (shape, n) in models.items():
        model = make(shape)
        pairs = islice(product(range(256), repeat=2), shape["vocab_size"] - 257)
        tokenizer = Tokenizer([*pairs])  # of no text: the files want one
        ways = {
            "LaMoE": lambda n, model=model: ours(model, n),
            "lamoe.py alone": lambda n, model=model: ours(model, n, one_row.RowStep.__base__),
        }
        if has_compiler("cpu"):
            ways["LaMoE --compile"] = lambda n, model=model: ours(model, n, compile=True)
        with tempfile.TemporaryDirectory() as folder:
            for way, make_way, out in (
                ("Hugging Face", hugging_face, Path(folder) / "folder"),
                ("llama.cpp", llama_cpp, Path(folder) / "model.gguf"),
            ):
                try:
                    export(model, tokenizer, out)
                    ways[way] = make_way(out)
                except (ImportError, ValueError) as error:
                    print(f'{way}: none here ({error}); pip install -e ".[oracle]"')
        for threads in (1, 2):
            torch.set_num_threads(threads)
            texts = {way: write(n) for way, write in ways.items()}  # warm, and compiled
            rates = {way: [] for way in ways}
            for _ in range(args.rounds):
                for way, write in ways.items():
                    start = time.perf_counter()
                    write(n)
                    rates[way].append(n / (time.perf_counter() - start))
            for way, rate in rates.items():
                ratio = statistics.median(a / b for a, b in zip(rates["LaMoE"], rate, strict=True))
                print(
                    f"{name:14} {threads} threads  {way:16} {statistics.median(rate):8,.0f} "
                    f"tokens/s (best {max(rate):,.0f}), LaMoE is {ratio:.2f} times as fast"
                    + ("" if texts[way] == texts["LaMoE"] else ", other ids"),
                    flush=True,
                )


if __name__ == "__main__":
    main()
