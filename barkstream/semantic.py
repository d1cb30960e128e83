"""Text to semantic tokens: the prompt, and tokens that are generated when somebody asks for them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future

import numpy as np

from barkstream.options import Schedule
from barkstream.sampling import Ints, Sampling
from barkstream.stages import Stages
from barkstream.tokens import SemanticLayout
from barkstream.voices import HistoryPrompt


def semantic_prompt(text_ids: Ints, history: HistoryPrompt | None, layout: SemanticLayout) -> Ints:
    """[text | history | infer] ids [n_prompt_ids]. text_ids: [n_text], offset and padded."""
    past = np.full(layout.n_text, layout.history_pad, np.int32)
    if history is not None:
        tail = history.semantic[-layout.n_text :]
        past[: len(tail)] = tail
    return np.concatenate([text_ids, past, [layout.infer]]).astype(np.int32)


def token_ids(prefix: Ints, layout: SemanticLayout) -> Ints:
    """A call's prefix as the graph reads it: ids [S, 2] that are summed; text and history share their positions.

    Raises ValueError for a prefix that is shorter than a prompt.
    """
    n, nothing = layout.n_text, layout.size.n_input_ids
    if len(prefix) < layout.n_prompt_ids:
        raise ValueError(
            f"a semantic prefix has at least {layout.n_prompt_ids} ids (text, history, infer), got {len(prefix)}"
        )
    pairs = np.full((len(prefix) - n, 2), nothing, np.int32)
    pairs[:, 0] = np.concatenate([prefix[:n], prefix[2 * n :]])
    pairs[:n, 1] = prefix[n : 2 * n]
    return pairs


class SemanticTokens:
    """One sentence's semantic tokens, generated as far as they are needed, and a little further in the background."""

    def __init__(
        self,
        prompt: Ints,
        layout: SemanticLayout,
        sampling: Sampling,
        max_seconds: float,
        schedule: Schedule,
        stages: Stages,
        stream: int,
        worker: Executor,
        watch: Callable[[Ints, bool], bool] | None = None,
        may_go_ahead: Callable[[], bool] = lambda: True,
    ):
        """watch: asked after each call with all tokens [n] and whether speech ended; true ends it.
        may_go_ahead: whether tokens may be generated before they are needed."""
        self.tokens: Ints = np.zeros(0, np.int32)
        self.ended = False
        # Seconds of the sentence's audio before the part that waits for more than n tokens: who reads them knows.
        self.due_s: Callable[[int], float | None] = lambda n: None
        self._n_most = max(1, int(min(max_seconds * layout.rate_hz, layout.max_new_tokens)))
        self._prompt, self._sampling, self._schedule = prompt, sampling, schedule
        self._stages, self._stream, self._worker = stages, stream, worker
        self._watch, self._may_go_ahead = watch, may_go_ahead
        self._call: Future[tuple[Ints, bool]] | None = None  # the one under way

    def ensure(self, n: int) -> None:
        """Generate until there are n tokens, or speech has ended."""
        while len(self.tokens) < n and not self.ended:
            least = self._schedule.semantic_least if len(self.tokens) else 1
            self._take(self._call or self._start(min(max(n - len(self.tokens), least), self._schedule.semantic_call)))
        self._go_ahead()

    def has(self, n: int) -> bool:
        """Whether there are n tokens, or all that there will be. Waits for none."""
        while len(self.tokens) < n and not self.ended and self._call and self._call.done():
            self._take(self._call)
            self._go_ahead()
        return self.ended or len(self.tokens) >= n

    def _take(self, call: Future[tuple[Ints, bool]]) -> None:
        new, self.ended = call.result()
        self.tokens, self._call = np.concatenate([self.tokens, new]), None
        if self._watch and self._watch(self.tokens, self.ended):
            self.ended = True
        self.ended = self.ended or len(self.tokens) >= self._n_most

    def begin(self) -> None:
        """The next ones are generated from now on, whether or not that may be yet. Not while somebody asks for some."""
        if self._schedule.semantic_ahead and not self.ended and self._call is None:
            self._call = self._start(self._schedule.semantic_ahead)

    def _go_ahead(self) -> None:
        if self._may_go_ahead():
            self.begin()

    def _start(self, n: int) -> Future[tuple[Ints, bool]]:
        prefix, n_now = np.concatenate([self._prompt, self.tokens]), len(self.tokens)
        n_call = min(n, self._n_most - n_now)
        due_s = self.due_s(n_now)
        return self._worker.submit(self._stages.semantic, prefix, n_call, n_now, self._sampling, self._stream, due_s)
