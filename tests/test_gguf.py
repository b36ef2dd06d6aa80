"""llama.cpp, as it is in the wheel xllamacpp, computes from our GGUF files what we do.

The wheel's own classes show neither ids nor logits. So its library is called by llama.cpp's C
interface, of which these few functions and fields have kept their places for years.
"""

import ctypes
import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_bpe import fuzz_text
from conftest import import_oracle, random_ids, random_model, small_config, with_biases
from tiny_run import call

import bpe
import lamoe
from bpe import SPECIAL, Tokenizer
from data.exchange import export, load
from data.run.checkpoint import save

program = importlib.import_module("data.exchange.export")
pytestmark = pytest.mark.oracle
SHAPES = [
    dict(),
    dict(qk_norm=True),
    dict(n_experts=1),
    dict(n_experts=1, qk_norm=True),
    dict(tie_embeddings=True, n_kv_heads=4, n_experts=8, top_k=3),
    dict(qk_norm=True, head_dim=32, dim=96, norm_eps=1e-3, rope_theta=500.0),
    dict(rope_factor=8.0, head_dim=64, rope_theta=5e5),
    dict(n_shared_experts=2),
    dict(n_shared_experts=1, tie_embeddings=True, head_dim=32, n_kv_heads=4),
    dict(n_shared_experts=1, qk_norm=True, n_experts=32, top_k=3),  # as the presets train
    dict(n_shared_experts=2, qk_norm=True, tie_embeddings=True, n_dense_layers=1),
    dict(qk_norm=True, n_dense_layers=1),
    dict(router="noisy", n_shared_experts=1, qk_norm=True),
    dict(router="switch"),
    dict(router="switch", n_shared_experts=1, qk_norm=True),
    dict(router="deepseek", n_experts=8, n_groups=4, top_groups=2, top_k=3, routed_scale=2.5),
    dict(router="deepseek", qk_norm=True, n_shared_experts=1, n_dense_layers=1),
]


class Settings(ctypes.Structure):
    """llama_context_params, or any other struct: longer than it is in the library."""

    _fields_ = [("n_ctx", ctypes.c_uint32), ("ints", ctypes.c_int32 * 25)]
    _fields_ += [("type_k", ctypes.c_int32), ("type_v", ctypes.c_int32)]
    _fields_ += [("rest", ctypes.c_ubyte * 900)]


class Batch(ctypes.Structure):
    _fields_ = [("n", ctypes.c_int32), ("pointers", ctypes.c_void_p * 6)]


class Llama:
    """A GGUF file in llama.cpp, with keys and values in fp32."""

    def __init__(self, path, n_ctx=256):
        folder = Path(import_oracle("xllamacpp").__file__).parent
        self.library = ctypes.CDLL(str(next(folder.glob("*.so"))))
        handle, text, n, yes = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool
        function = self.function
        model = function("llama_model_load_from_file", handle, text, Settings)
        start = function("llama_init_from_model", handle, handle, Settings)
        self.batch = function("llama_batch_get_one", Batch, handle, n)
        self.decode = function("llama_decode", n, handle, Batch)
        self.last = function("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), handle, n)
        self.split = function("llama_tokenize", n, handle, text, n, handle, n, yes, yes)
        self.model = model(str(path).encode(), function("llama_model_default_params", Settings)())
        assert self.model, f"{path}: llama.cpp can't read it"
        settings = function("llama_context_default_params", Settings)()
        assert (settings.type_k, settings.type_v) == (1, 1)  # fp16: where we expect them
        settings.n_ctx, settings.type_k, settings.type_v = n_ctx, 0, 0
        settings.ints[12] = 0  # no flash attention, which computes in fp16
        self.context = start(self.model, settings)
        self.vocab = function("llama_model_get_vocab", handle, handle)(self.model)
        self.vocab_size = function("llama_vocab_n_tokens", n, handle)(self.vocab)

    def function(self, name, result, *arguments):
        found = getattr(self.library, name)
        found.restype, found.argtypes = result, arguments
        return found

    def encode(self, text, begin=False):
        data = text.encode()
        ids = (ctypes.c_int32 * (len(data) + 8))()
        n = self.split(self.vocab, data, len(data), ids, len(ids), begin, False)
        return ids[:n]

    def logits(self, ids):
        """Of each position, the tokens given one by one."""
        rows = []
        for i in ids:
            one = (ctypes.c_int32 * 1)(i)
            assert self.decode(self.context, self.batch(one, 1)) == 0
            rows.append(self.last(self.context, -1)[: self.vocab_size])
        return np.array(rows)


@pytest.fixture(scope="module")
def tok():
    return Tokenizer.train([bpe.__doc__, "It's 2024!\n\n\n  x"], 300)


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    import_oracle("gguf")
    monkeypatch.chdir(tmp_path)


def model_of(shape, tokenizer, seed=1):
    changes = dict(dim=64, hidden_dim=96, seq_len=128, vocab_size=tokenizer.vocab_size)
    return with_biases(random_model(small_config(**{**changes, **shape}), seed), "router.bias")


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_greedy_text_are_ours(shape, tok):
    model = model_of(shape, tok)
    export(model, tok, "model.gguf")
    ids_BT = random_ids(model.config, 1, 28)
    new = torch.stack(list(model.generate(ids_BT, 100, temperature=0)), dim=1)
    ids = torch.cat([ids_BT, new], 1)
    with torch.no_grad():
        ours = model(ids).logits[0].numpy()
    logits = Llama("model.gguf").logits(ids[0].tolist())
    assert np.abs(ours).max() > 1 and np.abs(ours - logits).max() < 1e-4
    assert logits[27:-1].argmax(-1).tolist() == new[0].tolist()
    if shape.get("rope_factor"):  # at these positions it must matter
        config = lamoe.Config(**{**vars(model.config), "rope_factor": 1.0})
        plain = lamoe.LaMoE(config).eval()
        plain.load_state_dict(model.state_dict())
        with torch.no_grad():
            assert np.abs(plain(ids).logits[0].numpy() - logits).max() > 1e-3


@pytest.mark.parametrize("dtype, most", [("bf16", 1e-3), ("q8_0", 1e-2)])
@pytest.mark.parametrize("shape", SHAPES[2:4])
def test_fewer_bits_change_little(dtype, most, shape, tok):
    model = model_of(shape, tok)
    export(model, tok, "model.gguf", dtype=dtype)
    export(model, tok, "whole.gguf")
    assert Path("model.gguf").stat().st_size < 0.7 * Path("whole.gguf").stat().st_size
    ids = random_ids(model.config, 1, 40)
    with torch.no_grad():
        ours = model(ids).logits[0].double().log_softmax(-1)
    logits = torch.from_numpy(Llama("model.gguf").logits(ids[0].tolist()))
    theirs = logits.double().log_softmax(-1)
    assert 0 < (ours.exp() * (ours - theirs)).sum(-1).mean() < most  # Kullback-Leibler [nats]


@pytest.mark.parametrize("kind", ["bpe", "bytes"])
def test_ids_are_ours_on_2000_odd_strings(kind, tok):
    tokenizer = tok if kind == "bpe" else Tokenizer([])
    export(model_of({}, tokenizer), tokenizer, "model.gguf")
    llama, rng = Llama("model.gguf"), random.Random(0)
    texts = ["", SPECIAL, f"a{SPECIAL}b", bpe.__doc__, Path(bpe.__file__).read_text()]
    texts += [fuzz_text(rng) for _ in range(2000)]
    assert not [text for text in texts if llama.encode(text) != tokenizer.encode(text)]
    assert llama.encode("a", begin=True) == [tokenizer.eot, *tokenizer.encode("a")]


def refused(model, tokenizer, words):
    with pytest.raises(ValueError) as error:
        export(model, tokenizer, "model.gguf")
    assert all(word in str(error.value) for word in words), error.value
    assert not list(Path().iterdir())


def test_what_llama_cpp_does_not_compute_is_refused(tok, monkeypatch):
    for shape, words in (
        (dict(router="switch", eval_capacity_factor=1.0), ["capacity"]),
        (dict(router="deepseek", n_groups=4, top_groups=2), ["groups", "--n_groups 1"]),
        (dict(n_shared_experts=1, rope_factor=8.0), ["granitemoe", "rope_factor"]),
        (dict(qk_norm=True, rope_factor=8.0), ["rope_factor"]),
    ):
        refused(model_of(shape, tok), tok, words)
    refused(model_of({}, tok), None, ["tokenizer", "folder"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    refused(model_of({}, tok), tok, ["pip install gguf"])


def test_the_command_writes_one_file_and_never_over_another(tok, capsys):
    model = model_of(dict(qk_norm=True), tok)
    parts = {"config": vars(model.config), "model": model.state_dict(), "tokenizer": tok.state()}
    save("best.pt", parts)
    assert call(program, "best.pt", "model.gguf", "--dtype", "q8_0") == 0
    assert "llama.cpp" in capsys.readouterr().out
    assert sorted(path.name for path in Path().iterdir()) == ["best.pt", "model.gguf"]
    before = Path("model.gguf").read_bytes()
    assert call(program, "best.pt", "model.gguf") == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "model.gguf is there already" in message
    assert Path("model.gguf").read_bytes() == before
    for arguments in (
        ["best.pt", "folder", "--dtype", "q8_0"],
        ["best.pt", "m.gguf", "--dtype", "x"],
        ["best.pt", "m.gguf", "--family", "qwen3_next"],
    ):
        assert call(program, *arguments) == 2
        assert arguments[2] in capsys.readouterr().err
    assert call(program, "best.pt", "a/new/MODEL.GGUF", "--dtype", "q8_0") == 0
    assert Path("a/new/MODEL.GGUF").read_bytes() == before
    assert call(program, "best.pt", "folder", "--dtype", "bf16") == 0
    assert load("folder")[0].embed.weight.dtype == torch.bfloat16
