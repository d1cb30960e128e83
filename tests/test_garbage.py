"""What a process keeps is no longer looked through by Python's collector."""

import subprocess
import sys

CODE = """
import gc
from barkstream.garbage import spare_what_is_here
ring = []
ring.append(ring)
before = len(gc.get_objects())
spare_what_is_here()
print(before, len(gc.get_objects()), gc.isenabled())
del ring
left = [[] for _ in range(10)]
for each in left:
    each.append(each)
del left, each
print(gc.collect())
"""


def test_what_is_there_is_spared_and_what_comes_later_is_collected():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    before, after, is_enabled, collected = int(said[0]), int(said[1]), said[2], int(said[3])
    assert before > 1000 and after < before / 10
    assert is_enabled == "True" and collected >= 10
