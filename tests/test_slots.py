"""KV cache slots, and what the cuda engine asks of its kernels: those are stood in for, so this runs without a GPU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from barkstream.engines import Head, Row
from barkstream.engines.slots import Slot, Slots
from barkstream.sampling import COARSE, Sampling
from barkstream.tokens import GPTSize

torch = pytest.importorskip("torch")


def ids(*values):
    return np.array(values, np.int32)[:, None]


def row(stream, prefix=(1, 2, 3), n_tokens=4, position=0):
    return Row(ids(*prefix), n_tokens, position, Sampling(), stream)


def pool(n):
    return Slots([Slot(ids()) for _ in range(n)])


def test_a_stream_keeps_its_slot_until_it_is_released():
    slots = pool(2)
    with slots.lease([row(7)]) as (first,):
        pass
    with slots.lease([row(8), row(7)]) as leased:
        assert leased[1] is first
    assert slots.n_owned == 2
    slots.release(7)
    slots.release(7)
    assert slots.n_owned == 1


def test_what_a_slot_knows_of_a_prefix_is_what_both_begin_with():
    random = np.random.default_rng(0)
    for _ in range(300):
        width = random.integers(1, 3)
        held, prefix = (random.integers(0, 2, (random.integers(0, 6), width)) for _ in range(2))
        alike = 0
        while alike < min(len(held), len(prefix)) and (held[alike] == prefix[alike]).all():
            alike += 1
        assert Slot(held).n_known(prefix) == alike
    assert Slot(np.zeros((3, 1))).n_known(np.zeros((3, 2))) == 0


def test_the_stream_used_least_recently_gives_its_slot_up():
    slots = pool(2)
    for stream in (1, 2, 1):
        with slots.lease([row(stream)]) as (last,):
            pass
    with slots.lease([row(3)]) as (taken,):
        assert taken is not last
    with slots.lease([row(1)]) as (again,):
        assert again is last


def test_a_row_without_a_stream_and_a_stream_asked_twice_get_slots_that_are_given_back():
    slots = pool(3)
    with slots.lease([row(5), row(5), row(0)]) as leased:
        assert len({id(slot) for slot in leased}) == 3
        assert slots.n_owned == 3
    assert slots.n_owned == 1


def test_a_failed_call_gives_every_slot_back():
    slots = pool(2)
    with pytest.raises(RuntimeError), slots.lease([row(0), row(4)]):
        raise RuntimeError
    assert slots.n_owned == 1


def test_a_slot_knows_the_prefix_that_it_shares():
    slot = Slot(ids(1, 2, 3, 4))
    assert slot.n_known(ids(1, 2, 9, 4)) == 2
    assert slot.n_known(ids(1, 2)) == 2
    assert slot.n_known(np.ones((3, 2), np.int32)) == 0


@pytest.fixture
def engine(monkeypatch):
    """A CudaEngine whose decode draws code 0 of each codebook and whose prefills are noted."""
    from barkstream.engines import cuda
    from barkstream.engines.cuda import CudaEngine, GpuSlot

    # This machine has no pinned memory.
    monkeypatch.setattr(
        cuda,
        "download_all",
        lambda *tensors: [lambda part=..., tensor=tensor: tensor.numpy()[part] for tensor in tensors],
    )

    made = object.__new__(CudaEngine)
    made.size = GPTSize(n_layers=2, n_heads=1, width=64, block_size=64, n_input_ids=5000, n_output_ids=5000)
    made.head, made.max_batch = Head(COARSE, 1000, 2, 1024, None), 2
    made._slots = Slots([GpuSlot(ids(), i) for i in range(2)])
    made.prefilled = []

    def decode(rows):
        results = torch.tensor([[arguments.n_tokens, 0] for arguments in rows])
        return torch.zeros(len(rows), 64, dtype=torch.int32), results

    made.prefill = lambda prefixes, slots: made.prefilled.append(([len(prefix) for prefix in prefixes], list(slots)))
    made.decode = decode
    return made


def test_the_cuda_engine_prefills_only_what_a_slot_does_not_hold(engine):
    tokens = engine.generate([row(3)])[0].tokens
    assert tokens.tolist() == [1000, 2024, 1000, 2024]
    assert engine.prefilled == [([2], [1])]  # all but the last, which the first decode step feeds
    engine.generate([row(3, prefix=(1, 2, 3, *tokens), position=4)])
    assert len(engine.prefilled) == 1
    engine.generate([row(3, prefix=(9, 2, 3))])
    assert engine.prefilled[1:] == [([2], [1])]


def test_the_cuda_engine_decodes_more_rows_than_a_batch_in_several(engine):
    generations = engine.generate([row(stream) for stream in (1, 2, 0)])
    assert [len(generation.tokens) for generation in generations] == [4, 4, 4]
    assert engine.n_owned_slots <= 2
    engine.release(1)
    engine.release(2)
    assert engine.n_owned_slots == 0


def test_a_row_that_does_not_fit_is_refused(engine):
    with pytest.raises(ValueError, match="1 to 64 positions"):
        engine.generate([row(1, n_tokens=70)])


def test_what_is_left_of_a_row_has_the_engines_own_prefix_and_is_not_compared(engine):
    begun = row(3)
    (generation,) = engine.generate([begun])
    left = begun.after(generation.tokens[:4], generation.ids)
    assert left.ids is generation.ids and left.ids[:, 0].tolist() == [1, 2, 3, 1000, 2024, 1000, 2024]
    slot = engine._slots._owned[3]
    assert slot.ids.base is left.ids and slot.n_known(left.ids) == len(left.ids) - 1
    assert slot.n_known(left.ids.copy()) == len(left.ids) - 1  # equal ones are compared
    other = left.ids.copy()
    other[2] = 9
    assert slot.n_known(other) == 2


def test_a_checked_row_is_not_looked_through_again_and_its_pieces_are_checked():
    size = GPTSize(n_layers=2, n_heads=1, width=64, block_size=64, n_input_ids=5000, n_output_ids=5000)
    good, bad = row(3), row(3, prefix=(1, 5001))
    with pytest.raises(ValueError, match="prefix ids must be 0 to 4999, got 1 to 5001"):
        bad.checked(size)
    checked = good.checked(size)
    assert checked.is_checked and checked.piece(2).is_checked and checked.after(np.array([7], np.int32)).is_checked
    assert not good.is_checked and not good.piece(2).is_checked
    replace(bad, is_checked=True).check(size)  # whoever says so is believed


def test_a_call_that_fails_gives_its_slots_back(engine):
    def fails(rows):
        raise RuntimeError("no GPU")

    decode, engine.decode = engine.decode, fails
    with pytest.raises(RuntimeError, match="no GPU"):
        engine.start([row(3), row(0)])
    assert engine.n_owned_slots == 1
    engine.decode = decode
    assert len(engine.generate([row(3)])[0].tokens) == 4 and engine.n_owned_slots == 1


def test_rows_are_written_as_the_kernels_read_them():
    import ctypes

    from barkstream.engines.kernels.fused import ROW, RowArguments, room_for_rows, write_rows

    class AsInSamplingCuh(ctypes.Structure):
        _fields_ = [
            ("seed", ctypes.c_uint64), ("slot", ctypes.c_int), ("length", ctypes.c_int), ("position", ctypes.c_int),
            ("ids", ctypes.c_int * 2), ("n_tokens", ctypes.c_int), ("top_k", ctypes.c_int),
            ("temperature", ctypes.c_float), ("top_p", ctypes.c_float), ("min_eos_p", ctypes.c_float),
        ]  # fmt: skip

    fields = [("flag", ctypes.c_ubyte * 3), ("rows", room_for_rows(2))]
    into = type("Arguments", (ctypes.Structure,), {"_fields_": fields})()
    rows = RowArguments(2**64 - 1, 3, 4, 5, (-6, 7), 8, 9, 0.5, 0.25, 2.0), RowArguments(seed=1)
    write_rows(rows, into, type(into).rows.offset)
    read = (AsInSamplingCuh * 2).from_buffer(into, type(into).rows.offset)
    assert ctypes.sizeof(AsInSamplingCuh) == ROW.size and type(into).rows.offset % 8 == 0
    for row_, written in zip(read, rows, strict=True):
        for name, value in written._asdict().items():
            assert (tuple(row_.ids) if name == "ids" else getattr(row_, name)) == value
