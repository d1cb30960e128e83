"""Bark sometimes goes wrong: it talks on after the text, repeats itself, falls silent or turns into noise.

A guard watches one try at one sentence. What went wrong before anybody heard anything of it is said again with another seed;
what goes wrong later is cut. It also drops silence before and after the speech. First audio is not delayed: the first
sentence is watched while it is sent. The semantic tokens of every further sentence are looked at as a whole before it is said,
while the listener still hears the one before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np

from barkstream.sampling import Floats, Ints
from barkstream.text import estimated_seconds
from barkstream.tokens import Checkpoint

N_TRIES = 3
ACTIONS = RETRIED, CUT = "retried", "cut"
FAULTS = RUNAWAY, LOOP, SILENCE, NOISE = "runaway", "loop", "silence", "noise"

# Chosen by what 280 sentences of nano-bark never did, at temperatures from .7 to 1.4; no other checkpoint was at hand.
RUNAWAY_FACTOR, RUNAWAY_S = 2.0, 3.0  # a sentence takes at most twice its estimate and 3 s; nano-bark: 1.1 x and .8 s
LOOP_S, MAX_PERIOD_S, LOOP_EQUAL = (
    2.0,
    2.0,
    0.9,
)  # 90% of the last 2 s are what was said a period before; nano-bark: 76%
SILENT_RMS = 10 ** (-50 / 20)  # -50 dBFS, what the clients call inaudible
LONGEST_SILENCE_S = 2.0  # inside a sentence; nano-bark: .6 s
KEPT_SILENCE_S = 0.25  # before and after the speech
NOISE_S, NOISE_BLOCK_S, NOISE_DB = (
    1.6,
    0.05,
    1.5,
)  # steady for 1.6 s: speech moves by 5 dB at least (standard deviation)


class Guard:
    """Watches one try at one sentence; `fault` says what went wrong, `heard` whether speech has been passed on."""

    def __init__(self, sentence: str, checkpoint: Checkpoint, is_last_try: bool):
        rate, codec = checkpoint.semantic.rate_hz, checkpoint.codec
        self.fault: str | None = None
        self.heard = False
        self.max_seconds = RUNAWAY_S + RUNAWAY_FACTOR * estimated_seconds(sentence)
        self._is_last_try = is_last_try
        self._n_most = max(1, int(min(self.max_seconds * rate, checkpoint.semantic.max_new_tokens)))
        self._n_loop, self._n_period = round(LOOP_S * rate), round(MAX_PERIOD_S * rate)
        self._frame = codec.samples_per_frame
        frames_per_s = codec.sample_rate / codec.samples_per_frame
        self._n_kept, self._n_longest = round(KEPT_SILENCE_S * frames_per_s), round(LONGEST_SILENCE_S * frames_per_s)
        self._n_block = round(NOISE_BLOCK_S * frames_per_s)
        self._energies: deque[float] = deque(maxlen=self._n_block * round(NOISE_S / NOISE_BLOCK_S))
        self._held: list[Floats] = []  # silent frames that nobody needs to hear unless speech follows
        self._n_silent = self._n_passed = 0

    @property
    def is_hopeless(self) -> bool:
        """Whether this try had better be given up: something went wrong, nothing was heard, and another try is left."""
        return self.fault is not None and not self.heard and not self._is_last_try

    def watch(self, tokens: Ints, ended: bool) -> bool:
        """Whether to stop generating after these semantic tokens [n], all of the sentence so far."""
        if not ended and len(tokens) >= self._n_most:
            self.fault = RUNAWAY
        elif is_loop(tokens, self._n_loop, self._n_period):
            self.fault = LOOP
        return self.fault is not None

    def listen(self, chunks: Iterator[Floats]) -> Iterator[Floats]:
        """The chunks' speech; it ends where silence or noise begins to last. Audible samples are never held back."""
        for chunk in chunks:
            if self.is_hopeless:
                return
            passed: list[Floats] = []
            for frame in chunk.reshape(-1, self._frame):
                passed += self._hear(frame)
                if self.fault in (SILENCE, NOISE):
                    break
            if passed:
                yield np.concatenate(passed)
            if self.fault in (SILENCE, NOISE):
                return
        if not self.heard:
            self.fault = self.fault or SILENCE

    def _hear(self, frame: Floats) -> list[Floats]:
        """What to pass on now that this frame has come."""
        energy = float(np.mean(frame**2))
        self._energies.append(energy)
        if energy < SILENT_RMS**2:
            return self._hear_silence(frame)
        before = self._held if self.heard else self._held[-self._n_kept :]
        self._held, self._n_silent, self.heard = [], 0, True
        self._n_passed += 1
        if self._is_noise():
            self.fault = NOISE
            self.heard = self._n_passed > 1.5 * len(self._energies)  # else it was noise from the beginning
        return [*before, frame]

    def _hear_silence(self, frame: Floats) -> list[Floats]:
        self._n_silent += 1
        if self._n_silent > self._n_longest:
            self.fault = SILENCE
        if self.heard and self._n_silent <= self._n_kept:
            return [frame]
        self._held.append(frame)
        return []

    def _is_noise(self) -> bool:
        """Whether the last NOISE_S are sound whose level does not move."""
        energies = np.array(self._energies)
        if len(energies) < self._energies.maxlen or energies.min() < SILENT_RMS**2:  # type: ignore[operator]
            return False
        blocks = energies.reshape(-1, self._n_block).mean(axis=1)
        return float(np.std(10 * np.log10(blocks))) < NOISE_DB


def is_loop(tokens: Ints, n: int, max_period: int) -> bool:
    """Whether the last n tokens repeat, all but some, what came one period before; a period has 1 to max_period tokens."""
    last, periods = tokens[-n:], range(1, min(max_period, len(tokens) - n) + 1)
    return any(np.mean(last == tokens[-n - period : -period]) >= LOOP_EQUAL for period in periods)
