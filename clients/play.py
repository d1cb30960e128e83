"""Speech to the sound device while it arrives. Needs sounddevice (extra `play`) and PortAudio."""

from __future__ import annotations

import queue
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_AHEAD_CHUNKS = 64  # in hand; `play` waits beyond, so that a book does not pile up in memory


class SoundUnavailable(RuntimeError):
    """There is no way to play sound here."""


class Player:
    """Plays chunks one after another; silence where they come too late. A context manager: its end waits for the last.

    Raises SoundUnavailable without sounddevice, PortAudio or a device.
    """

    def __init__(self, sample_rate: int):
        try:
            import sounddevice
        except ImportError:
            raise SoundUnavailable("playing needs sounddevice: pip install 'barkstream[play]'") from None
        except OSError as error:
            raise SoundUnavailable(f"playing needs PortAudio (Debian: apt install libportaudio2): {error}") from None
        try:
            self._device: Any = sounddevice.OutputStream(samplerate=sample_rate, channels=1, dtype="float32")
            self._device.start()
        except sounddevice.PortAudioError as error:
            raise SoundUnavailable(f"there is no sound device to play on ({error}); leave --play out") from None
        self._chunks: queue.Queue[NDArray[np.float32] | None] = queue.Queue(MAX_AHEAD_CHUNKS)
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._play_all, daemon=True)
        self._thread.start()

    def write(self, samples: NDArray[np.float32]) -> None:
        """Play samples [n] after what came before; returns as soon as they are in line. Raises SoundUnavailable."""
        self._chunks.put(samples)
        if self._failure:
            raise SoundUnavailable(f"the sound device failed: {self._failure}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._device.abort()  # Ctrl-C means silence at once
            return
        self._chunks.put(None)
        self._thread.join()
        self._device.stop()  # waits for what the device holds
        self._device.close()

    def _play_all(self) -> None:
        while (samples := self._chunks.get()) is not None:
            if self._failure is None:
                try:
                    self._device.write(np.ascontiguousarray(samples[:, None]))
                except Exception as error:  # said by the next `write`; the queue must still be emptied
                    self._failure = error
