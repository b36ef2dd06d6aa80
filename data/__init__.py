"""Importing data before torch makes training bearable on a CPU that is shared.

torch's threads wait for each other by spinning. Where another process has one of the cores, the
others spin until it is their turn again, and a step takes up to 50 times as long. With 10,000
rounds instead of 300,000 it takes three times as long, and on a CPU of one's own a twentieth more.
(3,000 rounds: twice as long, but there a sixth more; two cores, the default run.)
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:  # who knows better has said so
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # of libgomp, which torch reads as it starts
