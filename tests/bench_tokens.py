"""Prints how fast a corpus is encoded to disk, against the tokenizer's own encode_array: the ratio.

    python tests/bench_tokens.py FILE [--vocab_size 8192] [--rounds 3]

CPU time, both sides in one process, each with an empty cache of chunks; reading the file, splitting
it into documents and writing the ids is counted on our side only.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bpe import Tokenizer  # noqa: E402
from data import datasets, tokens  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.CACHE = Path(folder)
        start = time.process_time()
        side = datasets.read(args.file).train
        seconds = time.process_time() - start
        print(f"reading, hashing, splitting: {side.n_bytes / 1e6 / seconds:.1f} MB/s")
        tokenizer, documents = Tokenizer.train(side, args.vocab_size), list(side)
        ways = {
            "to disk": lambda i: tokens.encode(side, tokenizer, Path(folder) / f"{i}.ids"),
            "encode_array": lambda i: tokenizer.encode_array(documents),
        }
        times = {name: [] for name in ways}
        for i in range(args.rounds):
            for name, way in ways.items():
                tokenizer = Tokenizer(tokenizer.merges)
                start = time.process_time()
                way(i)
                times[name].append(time.process_time() - start)
    speed = {name: side.n_bytes / 1e6 / statistics.median(t) for name, t in times.items()}
    for name, mb in speed.items():
        print(f"{name}: {mb:.1f} MB/s")
    print(f"ratio {speed['to disk'] / speed['encode_array']:.2f}")


if __name__ == "__main__":
    main()
