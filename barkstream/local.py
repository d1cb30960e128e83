"""The stages in this process: for tests, offline work and measurements; no server, no Triton."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np

from barkstream.engines import Chain, Chunk, Row, Window, Windows, by_windows, one_by_one
from barkstream.engines.open import open_causal, open_codec, open_fine
from barkstream.export.codec_state import state_size
from barkstream.options import Schedule
from barkstream.pipeline import Pipeline
from barkstream.sampling import Floats, Ints, Sampling
from barkstream.semantic import token_ids
from barkstream.text import TextTokenizer
from barkstream.tokens import Checkpoint
from barkstream.voices import HistoryPrompt, load_voices


class LocalStages:
    """All four stages of an exported model repository."""

    def __init__(
        self,
        repository: Path,
        n_threads: int = 0,
        n_slots: int = 2,
        max_batch: int = 2,
        engine: str = "onnxruntime",
        bits: int = 16,
        kv_bits: int | None = None,
    ):
        """repository: a folder that `barkstream export` filled. n_threads: of the CPU, 0 for all cores.

        engine: onnxruntime, or cuda for an NVIDIA GPU; bits, kv_bits: in which the latter decodes, see CudaEngine.
        Raises EngineError, FileNotFoundError or ValueError.
        """
        self.checkpoint = Checkpoint.load(repository / "bark_semantic" / "1" / "checkpoint.json")
        model = {
            stage: repository / f"bark_{stage}" / "1" / "model.onnx"
            for stage in ("semantic", "coarse", "fine", "codec")
        }
        limits = dict(n_slots=n_slots, max_batch=max_batch, n_threads=n_threads, bits=bits)
        self.semantic_engine = open_causal(
            engine, "semantic", model["semantic"], self.checkpoint, **limits, kv_bits=kv_bits
        )
        self.coarse_engine = open_causal(engine, "coarse", model["coarse"], self.checkpoint, **limits, kv_bits=kv_bits)
        self._fine = open_fine(engine, model["fine"], self.checkpoint, max_batch, (), n_threads)
        self._codec = open_codec(engine, model["codec"], self.checkpoint, max_batch, (), n_threads)
        self._semantic_lock, self._coarse_lock = Lock(), Lock()  # an engine serves one call at a time, as in Triton

    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, due_s: float | None = None
    ) -> tuple[Ints, bool]:
        ids = token_ids(prefix, self.checkpoint.semantic)
        with self._semantic_lock:
            generation = self.semantic_engine.generate([Row(ids, n_tokens, position, sampling, stream)])[0]
        return generation.tokens, generation.ended

    def coarse(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int, heads: Ints, windows: Ints
    ) -> Ints:
        chain = Chain.of(heads, windows, self.checkpoint.coarse)
        row = Row(prefix[:, None], n_tokens, position, sampling, stream, chain)
        row.check(self.checkpoint.coarse.size)
        with self._coarse_lock:
            return by_windows(self.coarse_engine.generate, [row])[0].tokens

    def fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float) -> Ints:
        return self._fine.fill([Window(codes, fill_from, uniforms, temperature)])[0]

    def fine_windows(self, codes: Ints, spans: Ints, uniforms: Floats, temperature: float) -> Ints:
        windows = Windows(codes, spans, self.checkpoint.fine.window, uniforms, temperature)
        windows.check(self.checkpoint.fine)
        return one_by_one(self._fine.fill, [windows])[0]

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        return self._codec.decode([Chunk(codes, state)])[0]

    def codec_state(self) -> Floats:
        return np.zeros(state_size(self.checkpoint.codec), np.float32)

    def release(self, stream: int) -> None:
        with self._semantic_lock:
            self.semantic_engine.release(stream)
        with self._coarse_lock:
            self.coarse_engine.release(stream)


def open_pipeline(
    repository: Path,
    schedule: Schedule | None = None,
    n_threads: int = 0,
    engine: str = "onnxruntime",
    bits: int = 16,
    kv_bits: int | None = None,
) -> tuple[Pipeline, dict[str, HistoryPrompt]]:
    """A pipeline over an exported model repository, and its voices by name. The rest as for LocalStages."""
    stages = LocalStages(repository, n_threads, engine=engine, bits=bits, kv_bits=kv_bits)
    folder = repository / "bark" / "1"
    tokenizer = TextTokenizer(folder / "tokenizer.json", stages.checkpoint.semantic)
    return Pipeline(stages.checkpoint, tokenizer, stages, schedule or Schedule()), load_voices(
        folder / "voices", stages.checkpoint
    )
