"""Importing data before torch makes training bearable on a CPU that is shared.

torch's threads wait for each other by spinning. Where another process has one of the cores, the
others spin until it is their turn again, and a step takes up to 50 times as long. With 3,000 rounds
instead of 300,000 it takes twice as long, and as long as ever on a CPU of one's own.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # who knows better has said so
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # of libgomp, which torch reads as it starts
