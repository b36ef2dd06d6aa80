"""All cores: batches of text go to processes, and what they make of them comes back in order.

These are not those of `multiprocessing`, which import the program that started them: with train.py
that would be torch, 300 MB and seconds for each. A worker here is `python data/workers.py`, about
30 MB. It reads pickles from its standard input, answers each on its standard output, and ends when
its input ends: so none outlives the program, however that ended.
"""

import contextlib
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a script: let it find its neighbours
    sys.path[0] = str(ROOT)

MOST = 8  # workers: with more, text of 1 GB would take more than 1 GB of memory in all
EACH = 1 << 23  # bytes of text that make one more worker worth its start
MOST_WORDS = 1 << 22  # different words in all workers, 700 MB: no text that repeats itself has more

# --- 1. The program that gives work ---------------------------------------------------------------


def how_many(n_bytes: int, most: int = MOST) -> int:
    """How many workers suit a text of so many bytes; fewer than two are none."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):  # a container's share: "200000 100000" is 2
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    n = min(cores, most, n_bytes // EACH)
    return n if n > 1 and sys.executable else 0


def results(task: str, setup, items, n: int):
    """Yields what `n` workers answer to each item, in the order of the items, then what is left.

    task, setup: a function of section 2 and its first argument. At most n + 2 items are in memory.
    ValueError if a worker finds a mistake in the text, or dies. All of them end with the generator.
    """
    workers = [Worker(task, (setup, n)) for _ in range(n)]
    idle, pending = queue.SimpleQueue(), deque()
    for worker in workers:
        idle.put(worker)

    def ask(item):  # in a thread: while it waits for a worker, the next text is read
        worker = idle.get()
        try:
            return worker.ask(item)
        finally:
            idle.put(worker)

    def first():
        while not wait([pending[0]], timeout=1).done:
            pass  # Windows notices Ctrl-C only in between
        return pending.popleft().result()

    threads = ThreadPoolExecutor(n)
    try:
        for item in items:
            pending.append(threads.submit(ask, item))
            if len(pending) > n + 1:
                yield first()
        while pending:
            yield first()
        pending.extend(threads.submit(worker.ask, None) for worker in workers)
        while pending:
            yield first()
    finally:
        for worker in workers:
            worker.end()
        threads.shutdown(cancel_futures=True)


class Worker:
    """A process that answers."""

    def __init__(self, *work):
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the program alone, which then ends its workers
        )
        self.send(work)

    def send(self, what) -> None:
        with contextlib.suppress(BrokenPipeError):  # `ask` tells of it
            pickle.dump(what, self.process.stdin, pickle.HIGHEST_PROTOCOL)
            self.process.stdin.flush()

    def ask(self, item):
        self.send(item)
        try:
            answer, error = pickle.load(self.process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError):
            raise ValueError(
                f"a process that reads the text was killed (exit code {self.process.wait()}), as "
                f"happens when memory runs out; start again, with fewer programs beside it"
            ) from None
        if error:
            raise ValueError(error)
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stdin):
            with contextlib.suppress(OSError, ValueError):  # it may hold what was not sent
                pipe.close()


# --- 2. What workers do ---------------------------------------------------------------------------


def encode(setup, items, reply) -> None:
    """Answers batches (texts, ends) with (their ids as bytes, the size of the texts in bytes)."""
    import bpe
    from data.foreign import tokenizer_from_state

    state, n = setup
    bpe.CACHE_SIZE = max(1 << 15, bpe.CACHE_SIZE // n)  # all together 150 MB when full
    tokenizer = tokenizer_from_state(state)
    for texts, ends in items:
        reply(ids_of(tokenizer, texts, ends))
    reply((b"", 0))


def ids_of(tokenizer, texts: list[str], ends: bool) -> tuple:
    """(ids of a batch, its size in bytes); no end-of-text after the last text unless that ends."""
    ids = tokenizer.encode_array(texts)
    return memoryview(ids if ends else ids[:-1]).tobytes(), sum(len(t.encode()) for t in texts)


def count(setup, items, reply) -> None:
    """Answers batches with (nothing, the size of the texts), and at the end with {word: count}."""
    words, (_, n) = Counter(), setup
    for texts, _ in items:
        add_words(words, texts, MOST_WORDS // n)
        reply(({}, sum(len(text.encode()) for text in texts)))
    reply((words, 0))


def add_words(words: Counter, texts, most: int = MOST_WORDS) -> None:
    """Counts the words of these texts too, unless there are so many different ones already."""
    import bpe

    if len(words) < most:
        for block in itertools.chain.from_iterable(map(bpe.blocks, texts)):
            words.update(bpe.split_words(block))


def main() -> None:
    """A worker's life: a task, then items until None."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    read, write = sys.stdin.buffer, sys.stdout.buffer

    def reply(answer, error=""):
        pickle.dump((answer, error), write, pickle.HIGHEST_PROTOCOL)
        write.flush()

    try:
        task, setup = pickle.load(read)
        items = iter(lambda: pickle.load(read), None)
        {"encode": encode, "count": count}[task](setup, items, reply)
    except ValueError as error:
        reply(None, f"{error}")
    except (EOFError, OSError):
        pass  # the program has ended


if __name__ == "__main__":
    main()
