"""What a process keeps is no longer looked through by Python's collector."""

import subprocess
import sys

CODE = """
import gc, weakref
from barkstream.garbage import spare_what_is_here
class Ring(list): pass
ring = Ring()
ring.append(ring)
before = len(gc.get_objects())
spare_what_is_here()
print(before, len(gc.get_objects()), gc.isenabled())
ring = weakref.ref(ring[0])
gc.collect()
was_there = ring() is not None
spare_what_is_here()
print(was_there, ring() is not None)
left = [[] for _ in range(10)]
for each in left:
    each.append(each)
del left, each
print(gc.collect())
"""


def test_what_is_there_is_spared_and_what_comes_later_is_collected():
    said = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.split()
    before, after, is_enabled, was_spared, is_there_still, collected = said
    assert int(before) > 1000 and int(after) < int(before) / 10
    assert (was_spared, is_there_still) == ("True", "False")  # what is no longer needed goes the next time
    assert is_enabled == "True" and int(collected) >= 10
