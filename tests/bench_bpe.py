"""Prints how bpe.py compares with rustbpe and tiktoken: ratios, both sides timed in one process.

    RAYON_NUM_THREADS=1 python tests/bench_bpe.py [FILE ...] [--vocab_size 16384] [--rounds 5]

Without files, it gathers some 60 MB of sources and texts of this machine. One text in ten is held
out: encoding is measured on those, first cold (nothing cached), then warm (median of the rounds).

    python tests/bench_bpe.py --fuzz 1000000

compares the ids of so many random strings with those of the exported tokenizer in transformers and
in tiktoken (some minutes).
"""

import argparse
import gzip
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
import unicodedata
from pathlib import Path

os.environ.setdefault("RAYON_NUM_THREADS", "1")  # one core on both sides
sys.path.insert(0, str(Path(__file__).parent.parent))


def seconds(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def gather(paths, limit=66_000_000):
    """Returns texts of `paths` (or of this machine) in random order, up to `limit` characters."""
    if not paths:
        roots = [sysconfig.get_paths()["stdlib"], "/usr/share", "/usr/include"]
        kinds = {".py", ".txt", ".rst", ".md", ".h", ".c", ".html", ".pm", ".gz"}
        found = (p for root in roots for p in sorted(Path(root).rglob("*")) if p.suffix in kinds)
        paths = [p for p in found if p.is_file() and 200 < p.stat().st_size < 300_000]
        random.Random(0).shuffle(paths)
    texts, size = [], 0
    for path in map(Path, paths):
        try:
            data = path.read_bytes()
            data = gzip.decompress(data) if path.suffix == ".gz" else data
            text = data.decode()
        except (OSError, EOFError, UnicodeDecodeError):
            continue
        texts += [text[i : i + 20_000] for i in range(0, len(text), 20_000)]
        size += len(text)
        if size > limit:
            break
    random.Random(1).shuffle(texts)
    return texts


def bench_bpe(texts, vocab_size=16384, rounds=5):
    """Prints our times and speeds, and theirs."""
    import rustbpe

    import bpe
    from data.foreign import to_tiktoken

    n = len(texts) // 10 or 1
    held_out, train = texts[:n], texts[n:]
    n_bytes = sum(len(text.encode()) for text in held_out)
    mb = sum(len(text.encode()) for text in train) / 1e6
    rust = rustbpe.Tokenizer()
    theirs, _ = seconds(
        lambda: rust.train_from_iterator(iter(train), vocab_size - 1, pattern=bpe.PATTERN)
    )
    ours, tok = seconds(lambda: bpe.Tokenizer.train(train, vocab_size))
    same = [bytes(b) for b, _ in rust.get_mergeable_ranks()] == list(tok.tokens[:-1])
    print(f"train {mb:.0f} MB, {vocab_size} ids: {ours:.1f} s, rustbpe {theirs:.1f} s: ", end="")
    print(f"{ours / theirs:.2f} x the time, merges equal: {same}")

    encoding = to_tiktoken(tok)
    ways = {
        "tiktoken": lambda: [encoding.encode_ordinary(text) for text in held_out],
        "encode": lambda: [tok.encode(text) for text in held_out],
        "encode_array": lambda: tok.encode_array(held_out),
    }
    for name in ("encode", "encode_array"):
        ratios = []
        for _ in range(rounds):
            theirs, _ = seconds(ways["tiktoken"])
            tok = bpe.Tokenizer(tok.merges)  # with nothing remembered
            cold, _ = seconds(ways[name])
            ratios.append(theirs / cold)
        print(f"{name} cold: {n_bytes / cold / 1e6:.1f} MB/s, tiktoken ", end="")
        print(f"{n_bytes / theirs / 1e6:.1f}: {statistics.median(ratios):.2f} x the speed")
        tok = bpe.Tokenizer(tok.merges)
        tok.encode_array(train[: len(train) // 3])
        other, _ = seconds(ways[name])
        print(f"{name} warmed on other text: {n_bytes / other / 1e6:.1f} MB/s")
    times = {name: [] for name in ways}
    for _ in range(rounds):  # interleaved, so that noise of the machine meets all alike
        for name, way in ways.items():
            times[name].append(seconds(way)[0])
    speed = {name: n_bytes / statistics.median(t) / 1e6 for name, t in times.items()}
    for name in ("encode", "encode_array"):
        ratio = speed[name] / speed["tiktoken"]
        print(f"{name} warm: {speed[name]:.1f} MB/s, tiktoken {speed['tiktoken']:.1f}: ", end="")
        print(f"{ratio:.2f} x the speed")
    prompt = "Once upon a time there was a small dragon, it's ok"
    for name, encode in {"tiktoken": encoding.encode_ordinary, "encode": tok.encode}.items():
        micro = seconds(lambda e=encode: [e(prompt) for _ in range(10_000)])[0] * 100
        print(f"50-byte prompt, {name}: {micro:.1f} us")
    for name, decode in {"tiktoken": encoding.decode, "decode": tok.decode}.items():
        ids = tok.encode_array(held_out)[:100_000].tolist()
        took, text = seconds(lambda d=decode, i=ids: d(i))
        print(f"{name}: {len(text.encode()) / took / 1e6:.0f} MB/s")
    took, _ = seconds(lambda: tok.encode("a" * 1_000_000))
    print(f'"a" * 1,000,000: {took:.1f} s')


PIECES = [
    *(
        "the",
        " cat",
        "DON'T",
        "it's",
        "I'll",
        "été",
        "e\u0301",
        "a\u0300\u0316\u0301",
        "ſ",
        "ß",
        "İ",
    ),
    *("😀", "👩\u200d👩\u200d👧", "🏳️\u200d🌈", "👍🏽", "\ufe0f", "\u200d", "\ufeff", "\u00ad"),
    *("שלום", "مرحبا", "\u202e", "\u200f", "नमस्ते", "กำ", "字字", "한국어", "한", "ﬁ", "Ⅷ"),
    *(
        "0",
        "12345",
        "٣٤",
        "²",
        "3.14",
        "1,000,000",
        "\0",
        "\x01",
        "\x1b[0m",
        "\x1c",
        "\x7f",
        "\x85",
    ),
    *(" ", "  ", "\t", "\n", "\r\n", "\r", "\n\n \n", "\xa0", "\u2028", "\u3000", " \n", "\x0b"),
    *(
        "!",
        "?!",
        "...",
        "--",
        "<|endoftext|>",
        "<|",
        "</s>",
        "_",
        "'",
        "''",
        '"',
        "=" * 70,
        "a" * 300,
    ),
]


def fuzz_text(rng):
    """A string of pieces at which tokenizers differ, runs of one, and arbitrary characters.

    Not of private or unassigned characters: there the tables of Unicode versions differ.
    """
    parts = []
    for _ in range(rng.choice((1, 2, 3, 5, 8, 20))):
        kind = rng.random()
        if kind < 0.7:
            parts.append(rng.choice(PIECES))
        elif kind < 0.8:
            parts.append(rng.choice(PIECES)[:3] * rng.choice((2, 3, 4, 7, 50)))
        else:
            limit = rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x20000))
            letter = chr(rng.randrange(limit))
            parts.append(letter if unicodedata.category(letter) not in ("Cs", "Cn", "Co") else "x")
    return "".join(parts)


def fuzz(n, texts, vocab_size):
    """Prints how many of n random strings got the same ids in all three."""
    from transformers import AutoTokenizer

    import bpe
    from data.foreign import to_tiktoken, tokenizer_files

    tok = bpe.Tokenizer.train(texts, vocab_size)
    with tempfile.TemporaryDirectory() as folder:
        for name, text in tokenizer_files(tok).items():
            Path(folder, name).write_text(text, encoding="utf-8")
        auto = AutoTokenizer.from_pretrained(folder)
    encoding, rng, same, size, start = to_tiktoken(tok), random.Random(0), 0, 0, time.time()
    for done in range(0, n, 1000):
        strings = [fuzz_text(rng) for _ in range(min(1000, n - done))]
        for text, ids in zip(strings, auto(strings)["input_ids"], strict=True):
            ours, size = tok.encode(text), size + len(text)
            if ours == ids == encoding.encode_ordinary(text) and tok.decode(ours) == text:
                same += 1
            else:
                print(f"differs: {text!r}")
    seconds = time.time() - start
    print(f"{same:,} of {n:,} strings ({size:,} characters) equal, in {seconds:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--vocab_size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5, help="for the median of warm encoding")
    parser.add_argument("--fuzz", type=int, metavar="N", help="compare ids of N random strings")
    args = parser.parse_args()
    if args.fuzz:
        fuzz(args.fuzz, gather(args.files, 5_000_000), args.vocab_size)
    else:
        bench_bpe(gather(args.files), args.vocab_size, args.rounds)
