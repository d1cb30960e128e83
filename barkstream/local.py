"""The stages in this process: for tests, offline work and measurements; no server, no Triton."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

import numpy as np
import onnxruntime as ort

from barkstream.engines import Head, Row
from barkstream.engines.onnxruntime import CausalEngine, open_session
from barkstream.options import Schedule
from barkstream.pipeline import Pipeline
from barkstream.sampling import Floats, Ints, Sampling
from barkstream.semantic import token_ids
from barkstream.text import TextTokenizer
from barkstream.tokens import Checkpoint
from barkstream.voices import HistoryPrompt, load_voices


class LocalStages:
    """All four stages of an exported model repository on ONNX Runtime."""

    def __init__(self, repository: Path, n_threads: int = 0, n_slots: int = 2, max_batch: int = 2):
        """repository: a folder that `barkstream export` filled. n_threads: 0 for all cores."""
        self.checkpoint = Checkpoint.load(repository / "bark_semantic" / "1" / "checkpoint.json")
        layouts = self.checkpoint
        model = {
            stage: repository / f"bark_{stage}" / "1" / "model.onnx"
            for stage in ("semantic", "coarse", "fine", "codec")
        }
        limits = (n_slots, max_batch, n_threads)
        self.semantic_engine = CausalEngine(
            model["semantic"], layouts.semantic.size, Head.semantic(layouts.semantic), *limits
        )
        self.coarse_engine = CausalEngine(model["coarse"], layouts.coarse.size, Head.coarse(layouts.coarse), *limits)
        self._semantic_lock, self._coarse_lock = Lock(), Lock()  # an engine serves one call at a time, as in Triton
        self._fine = open_session(model["fine"], n_threads)
        self._codec = open_session(model["codec"], n_threads)

    def semantic(
        self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int
    ) -> tuple[Ints, bool]:
        ids = token_ids(prefix, self.checkpoint.semantic)
        with self._semantic_lock:
            generation = self.semantic_engine.generate([Row(ids, n_tokens, position, sampling, stream)])[0]
        return generation.tokens, generation.ended

    def coarse(self, prefix: Ints, n_tokens: int, position: int, sampling: Sampling, stream: int) -> Ints:
        with self._coarse_lock:
            return self.coarse_engine.generate([Row(prefix[:, None], n_tokens, position, sampling, stream)])[0].tokens

    def fine(self, codes: Ints, fill_from: int, uniforms: Floats, temperature: float) -> Ints:
        return _run(
            self._fine,
            codes=codes,
            fill_from=np.array([fill_from], np.int32),
            uniforms=uniforms,
            temperature=np.array([temperature], np.float32),
        )[0]

    def codec(self, codes: Ints, state: Floats) -> tuple[Floats, Floats]:
        audio, next_state = _run(self._codec, codes=codes, state=state)
        return audio, next_state

    def codec_state(self) -> Floats:
        return np.zeros(state_size(self._codec), np.float32)

    def release(self, stream: int) -> None:
        with self._semantic_lock:
            self.semantic_engine.release(stream)
        with self._coarse_lock:
            self.coarse_engine.release(stream)


def open_pipeline(
    repository: Path, schedule: Schedule | None = None, n_threads: int = 0
) -> tuple[Pipeline, dict[str, HistoryPrompt]]:
    """A pipeline over an exported model repository, and its voices by name."""
    stages = LocalStages(repository, n_threads)
    folder = repository / "bark" / "1"
    tokenizer = TextTokenizer(folder / "tokenizer.json", stages.checkpoint.semantic)
    return Pipeline(stages.checkpoint, tokenizer, stages, schedule or Schedule()), load_voices(
        folder / "voices", stages.checkpoint
    )


def state_size(codec: ort.InferenceSession) -> int:
    """Length of the codec's state, from its graph."""
    return next(value.shape[1] for value in codec.get_inputs() if value.name == "state")


def _run(session: ort.InferenceSession, **inputs: np.ndarray) -> list[np.ndarray]:
    """One call for one stream: a batch dimension added and taken away again."""
    outputs = session.run(None, {name: array[None] for name, array in inputs.items()})
    return [np.asarray(output)[0] for output in outputs]
