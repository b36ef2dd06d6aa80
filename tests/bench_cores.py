"""Prints how much faster two workers are than one process: words counted, documents to ids.

    python tests/bench_cores.py FILE [--workers 2] [--rounds 5]

Both sides alternate, each with nothing remembered; the median of the ratios counts. Only a machine
that does nothing else tells much. The bytes on the disk are compared, too.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from bpe import Tokenizer, learn_merges  # noqa: E402
from data import datasets, tokens, workers  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        datasets.CACHE = Path(folder)
        start = time.perf_counter()
        side = datasets.read(args.file).train
        print(f"reading, hashing: {side.n_bytes / 1e6 / (time.perf_counter() - start):.1f} MB/s")
        merges = learn_merges(tokens.count_words(side, side.n_bytes), 8192 - 257)

        def encode(n):
            tokens.encode(side, Tokenizer(merges), Path(folder) / f"{n}.ids")

        def encode_anew(n):
            (Path(folder) / f"{n}.ids").unlink(missing_ok=True)
            encode(n)

        ways = {"count": lambda n: tokens.count_words(side, side.n_bytes), "encode": encode_anew}
        for name, way in ways.items():
            seconds = {0: [], args.workers: []}
            for _ in range(args.rounds):
                for n in seconds:
                    workers.how_many = lambda n_bytes, most=0, n=n: n
                    start = time.perf_counter()
                    way(n)
                    seconds[n].append(time.perf_counter() - start)
            alone, together = seconds.values()
            ratio = statistics.median(a / b for a, b in zip(alone, together, strict=True))
            mb = side.n_bytes / 1e6 / statistics.median(together)
            print(f"{name}: {mb:.1f} MB/s, {ratio:.2f} x the speed of one process")
        one, many = ((Path(folder) / f"{n}.ids").read_bytes() for n in (0, args.workers))
        print(f"same bytes: {one == many}")


if __name__ == "__main__":
    main()
