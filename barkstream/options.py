"""What a caller may ask for, checked once at the door, and how a server cuts the work into chunks."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, fields, replace
from typing import Any

from barkstream.languages import LANGUAGES
from barkstream.sampling import Sampling
from barkstream.tokens import Checkpoint, CoarseLayout

MAX_TEMPERATURE = 5.0
MAX_SEED = 2**63 - 1
# With less in hand a listener is served as one who waits: sooner than a sentence that may take its time.
LEAST_LEAD_S = 1.5
# Audio before a sentence that may take its time: some is played while it is begun, and a loaded GPU makes its first chunk in up to 1 s.
LATER_AFTER_S = 1.6


class BadRequest(ValueError):
    """The caller's mistake; the message says what is wrong and what would be right."""


@dataclass(frozen=True)
class SpeechOptions:
    """One request's options. The defaults are Suno's."""

    seed: int = 0
    temperature: float = 0.7  # semantic and coarse
    fine_temperature: float = 0.5
    top_k: int = 0  # 0: off; a caller leaves it out
    top_p: float = 1.0  # 1: off
    min_eos_p: float = 0.2
    max_seconds: float = math.inf  # of speech, over all sentences
    lookahead: int | None = None  # semantic tokens a coarse window waits for; None: exactly what the reference reads
    streaming: bool = True
    return_prompt: bool = False
    language: str | None = None  # of the text; None: its script's, else its voice's, else English
    normalize: bool = False  # numbers, dates and abbreviations become words; off: Bark hears the text as it is
    guard: bool = False  # a sentence that goes wrong is said again or cut (barkstream.guard)
    # seconds of audio that the listener has in hand, of requests before: this one goes on from there
    lead_s: float = 0.0

    @classmethod
    def parse(cls, given: dict[str, Any]) -> SpeechOptions:
        """Options from plain values; what is absent takes its default, an absent seed is drawn.

        Raises BadRequest for an unknown name, a value of the wrong kind, or one out of its range.
        """
        unknown = set(given) - {field.name for field in fields(cls)}
        if unknown:
            raise BadRequest(f"no option {sorted(unknown)[0]!r}; options: {', '.join(f.name for f in fields(cls))}")
        values = {name: _CHECKS[name](name, value) for name, value in given.items()}
        return cls(**{"seed": secrets.randbits(31), **values})

    @property
    def in_hand_s(self) -> float:
        """Seconds of audio with which the listener can wait; 0: somebody waits for the first chunk."""
        return self.lead_s if self.lead_s >= LEAST_LEAD_S else 0.0

    def sampling(self, seed: int) -> Sampling:
        """How the semantic and coarse stages draw, for one sentence's seed."""
        return Sampling(seed, self.temperature, self.top_k, self.top_p, self.min_eos_p)


def _number(low: float, high: float, low_is_allowed: bool = True) -> Any:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BadRequest(f"{name} must be a number, got {value!r}")
        inside = low <= value <= high and (low_is_allowed or value > low)  # False for NaN
        if not inside:
            least = f"at least {low:g}" if low_is_allowed else f"above {low:g}"
            most = f" and at most {high:g}" if math.isfinite(high) else ""
            raise BadRequest(f"{name} must be {least}{most}, got {value:g}")
        return float(value)

    return check


def _integer(low: int, high: int, hint: str = "") -> Any:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRequest(f"{name} must be a whole number, got {value!r}")
        if not low <= value <= high:
            raise BadRequest(f"{name} must be {low} to {high}, got {value}{hint}")
        return value

    return check


def _language(name: str, value: Any) -> str:
    if value not in LANGUAGES:
        raise BadRequest(f"{name} must be one of {', '.join(LANGUAGES)}, got {value!r}")
    return str(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, got {value!r}")
    return value


_CHECKS = dict(
    seed=_integer(0, MAX_SEED),
    temperature=_number(0, MAX_TEMPERATURE),
    fine_temperature=_number(0, MAX_TEMPERATURE),
    top_k=_integer(1, 2**31 - 1, hint="; leave top_k out to draw from all tokens"),
    top_p=_number(0, 1, low_is_allowed=False),
    min_eos_p=_number(0, 1, low_is_allowed=False),
    max_seconds=_number(0, math.inf, low_is_allowed=False),
    lookahead=_integer(0, 2**31 - 1),
    streaming=_boolean,
    return_prompt=_boolean,
    language=_language,
    normalize=_boolean,
    guard=_boolean,
    lead_s=_number(0, math.inf),
)


@dataclass(frozen=True)
class Schedule:
    """How a stream is cut: a deployment's choice, set in bark/config.pbtxt. All counts are frames unless named otherwise."""

    chunk_frames: tuple[int, ...] = (24, 30, 30, 60, 60, 90, 120)  # sizes of a sentence's chunks; the last one repeats
    fine_context: int = 128  # frames already filled, to the left of a chunk
    fine_lookahead: tuple[int, ...] = (6, 6, 6, 6, 6, 6, 36)  # coarse frames after each chunk; the last one repeats
    fine_window: int = 0  # a window's frames, at least: more context, and where there is none, unknown frames behind
    coarse_call: int = 60  # coarse tokens asked for in one call, at most
    semantic_call: int = 64  # semantic tokens asked for in one call, at most
    # tokens of a sentence's coarse windows, 0: the checkpoint's (60); the last one repeats. Suno's sliding_window_len. Before a longer one
    # goes as much less history (its max_coarse_history): CoarseLayout.history_before
    sliding_window_len: tuple[int, ...] = (0,)
    # coarse_call tokens that each of a sentence's calls may bring, after the first audio, where their windows' semantic tokens are there;
    # the last one repeats
    coarse_windows: tuple[int, ...] = (1,)
    offline_coarse_windows: int = 1  # the same without streaming; above 1: once all semantic tokens are there
    offline_semantic_call: int = 0  # semantic_call without streaming or a guard, who looks in between; 0: the same
    offline_fine_windows: int = 1  # of a fine call without streaming; above 1 the exported graph alone cannot do it
    semantic_least: int = 1  # semantic tokens asked for in one call, at least, once there are some
    coarse_ahead: int = 4  # coarse calls made before they are needed, while the fine stage works; 0: none
    semantic_ahead: int = 24  # semantic tokens generated before they are needed, while the coarse stage works; 0: none
    ahead_at_once: bool = True  # false: only from a stream's first chunk on, which nothing may hold up
    ahead_from_window: bool = False  # true: semantic tokens from its first coarse window on
    # of a sentence that has LATER_AFTER_S of audio before it, most of which its listener has in hand; none: the same
    later_chunk_frames: tuple[int, ...] = ()
    later_fine_lookahead: tuple[int, ...] = ()
    later_sliding_window_len: tuple[int, ...] = ()
    sentence_pause_s: float = 0.25  # after a sentence; other pauses are multiples of it (barkstream.text)
    # of a text's sentences, the last one repeats: one that is still being said ends then; the checkpoint's bound holds anyway (15.4 s)
    max_sentence_s: tuple[float, ...] = (math.inf,)

    def __post_init__(self) -> None:
        calls = (self.coarse_call, self.semantic_call, self.semantic_least)
        offline = self.offline_coarse_windows, self.offline_fine_windows
        counts = (*self.chunk_frames, *self.later_chunk_frames, *calls, *self.coarse_windows, *offline)
        ahead = (self.coarse_ahead, self.semantic_ahead)
        extents = (self.fine_context, *self.fine_lookahead, self.fine_window, *ahead, self.offline_semantic_call)
        extents += self.sliding_window_len + self.later_sliding_window_len + self.later_fine_lookahead
        lists = (
            self.chunk_frames,
            self.fine_lookahead,
            self.coarse_windows,
            self.sliding_window_len,
            self.max_sentence_s,
        )
        if not all(lists):
            raise ValueError(
                "chunk_frames, fine_lookahead, coarse_windows, sliding_window_len and max_sentence_s must have at least "
                f"one value: {self}"
            )
        for seconds in self.max_sentence_s:
            if not seconds > 0:
                raise ValueError(f"max_sentence_s must be seconds above 0 (inf: no bound), got {seconds:g}")
        if min(counts) < 1 or min(extents) < 0:
            raise ValueError(f"chunks and calls must be at least 1, windows and what is ahead at least 0: {self}")

    def sentence_s(self, index: int) -> float:
        """What a text's sentence number `index` may last."""
        return self.max_sentence_s[min(index, len(self.max_sentence_s) - 1)]

    def chunk(self, index: int) -> int:
        """Frames of a sentence's chunk number `index`."""
        return self.chunk_frames[min(index, len(self.chunk_frames) - 1)]

    def lookahead(self, index: int) -> int:
        """Coarse frames that a sentence's chunk number `index` sees after its end, where the sentence has so many."""
        return self.fine_lookahead[min(index, len(self.fine_lookahead) - 1)]

    def windows(self, index: int) -> int:
        """coarse_call tokens that a sentence's call number `index` may bring."""
        return self.coarse_windows[min(index, len(self.coarse_windows) - 1)]

    def coarse_window(self, index: int, layout: CoarseLayout) -> int:
        """Tokens of a sentence's coarse window number `index`."""
        return self.sliding_window_len[min(index, len(self.sliding_window_len) - 1)] or layout.window

    def max_coarse_history(self, layout: CoarseLayout) -> int:
        """The most coarse tokens of history before any window."""
        return max(layout.history_before(n or layout.window) for n in self.sliding_window_len)

    def behind(self, audio_s: float) -> Schedule:
        """For a sentence with so much before it. What its listener has in hand of that would tell better, but then the same request would
        be cut in another way under load, and sound a little different."""
        return self if audio_s < LATER_AFTER_S else self.later()

    def later(self) -> Schedule:
        """For a sentence whose listener has those before in hand."""
        return replace(
            self,
            chunk_frames=self.later_chunk_frames or self.chunk_frames,
            fine_lookahead=self.later_fine_lookahead or self.fine_lookahead,
            sliding_window_len=self.later_sliding_window_len or self.sliding_window_len,
        )

    def offline(self, is_guarded: bool) -> Schedule:
        """For speech that is not streamed: nobody listens until all of it is there."""
        longer = self.semantic_call if is_guarded else self.offline_semantic_call or self.semantic_call
        return replace(self, coarse_windows=(self.offline_coarse_windows,), semantic_call=longer)

    def in_company(self) -> Schedule:
        """Without streaming no call longer than a window: where many streams share instances, each would keep one from the others."""
        return replace(self, offline_coarse_windows=1, offline_fine_windows=1, offline_semantic_call=0)

    def in_crowd(self) -> Schedule:
        """Where first chunks are held anyway: it is the second that comes late, for its semantic tokens wait behind newcomers."""
        return replace(self, ahead_from_window=True)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises ValueError for a schedule that the checkpoint's stages cannot follow."""
        if self.chunk(0) < checkpoint.codec.min_first_chunk:
            raise ValueError(
                f"the first chunk must have at least {checkpoint.codec.min_first_chunk} frames: the codec reads that many"
            )
        if self.coarse_call % checkpoint.coarse.n_codebooks:
            raise ValueError(f"coarse_call must be a multiple of {checkpoint.coarse.n_codebooks}: whole frames")
        layout = checkpoint.coarse
        for n in self.sliding_window_len + self.later_sliding_window_len:
            if n % layout.n_codebooks or layout.history_before(n or layout.window) < 1:
                raise ValueError(
                    f"sliding_window_len must be multiples of {layout.n_codebooks} below {layout.max_history + layout.window}, "
                    f"so that there is room for history before a window; got {n}"
                )
        if self.fine_window > checkpoint.fine.window:
            raise ValueError(
                f"fine_window must be at most the fine stage's {checkpoint.fine.window} frames, got {self.fine_window}"
            )
        for schedule, whose in ((self, ""), (self.later(), " of a later sentence")):
            for index in range(max(len(schedule.chunk_frames), len(schedule.fine_lookahead))):
                extents = schedule.fine_context, schedule.chunk(index), schedule.lookahead(index)
                if sum(extents) > checkpoint.fine.window:
                    raise ValueError(
                        "fine_context, a chunk and its fine_lookahead must fit the fine stage's window of "
                        f"{checkpoint.fine.window} frames; chunk {index}{whose} takes {' + '.join(map(str, extents))} = {sum(extents)}"
                    )

    @classmethod
    def parse(cls, given: dict[str, str]) -> Schedule:
        """A schedule from config.pbtxt parameters; unknown names are ignored, they are Triton's.

        chunk_frames, fine_lookahead, coarse_windows, sliding_window_len and max_sentence_s are lists ("24, 30, 60"); one number holds for
        all. A later sentence's may be empty. Raises ValueError that names the parameter.
        """
        parsed: dict[str, Any] = {}
        for field in fields(cls):
            if field.name in given:
                try:
                    parsed[field.name] = _PARSERS.get(field.name, int)(given[field.name])
                except (ValueError, KeyError):
                    example = str(field.default).strip("(),").lower() or "60, 90"
                    raise ValueError(
                        f"{field.name} must be written like {example!r}, got {given[field.name]!r}"
                    ) from None
        return replace(cls(), **parsed)


def _whole_numbers(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(","))


def _whole_numbers_or_none(text: str) -> tuple[int, ...]:
    return _whole_numbers(text) if text.strip() else ()


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(n) for n in text.split(","))


def _true_or_false(text: str) -> bool:
    return {"true": True, "false": False}[text]


_PARSERS: dict[str, Any] = {
    "chunk_frames": _whole_numbers,
    "fine_lookahead": _whole_numbers,
    "later_chunk_frames": _whole_numbers_or_none,
    "later_fine_lookahead": _whole_numbers_or_none,
    "later_sliding_window_len": _whole_numbers_or_none,
    "coarse_windows": _whole_numbers,
    "sliding_window_len": _whole_numbers,
    "sentence_pause_s": float,
    "max_sentence_s": _numbers,
    "ahead_at_once": _true_or_false,
    "ahead_from_window": _true_or_false,
}  # the rest are integers
