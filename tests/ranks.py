"""What test_ranks.py runs under torchrun: python tests/ranks.py, started once for all its runs.

Each line of runs.txt is a run: a number of steps after which Ctrl-C is pressed (0: never), then the
flags of train.py.
"""

import contextlib
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
from tiny_run import at_training_step, call, press_ctrl_c  # noqa: E402

import train  # noqa: E402
from data.run import ranks  # noqa: E402


def main() -> None:
    ranks.dist.destroy_process_group = lambda: None  # all runs go through one group
    for line in Path("runs.txt").read_text().splitlines():
        interrupt_at, *flags = line.split()
        pressing = contextlib.nullcontext()
        if int(interrupt_at):
            pressing = at_training_step(int(interrupt_at), press_ctrl_c)
        with pressing:
            code = call(train, *flags)
        assert code in (0, 130), (line, code)


if __name__ == "__main__":
    main()
