"""Text in, chunks of speech out: the straight line, as one generator. Start reading here."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event

import numpy as np

from barkstream.ahead import Ahead, Workers
from barkstream.coarse import generate_coarse
from barkstream.codec import decode_audio
from barkstream.fine import Draws, fill_offline, generate_fine
from barkstream.guard import CUT, N_TRIES, RETRIED, RUNAWAY, Guard
from barkstream.languages import choose_language
from barkstream.options import BadRequest, Schedule, SpeechOptions
from barkstream.sampling import Floats, Ints, sentence_seed
from barkstream.semantic import SemanticTokens, semantic_prompt
from barkstream.stages import Stages
from barkstream.text import Sentence, TextTokenizer, check_text
from barkstream.tokens import Checkpoint
from barkstream.voices import HistoryPrompt, find_voice


class NothingSaid(RuntimeError):
    """The model ended before it said anything."""


@dataclass
class Speech:
    """What has been generated so far; kept when a caller wants to go on in this voice."""

    semantic: list[Ints] = field(default_factory=list)  # [n] a sentence
    coarse: list[Ints] = field(default_factory=list)  # [2, t] pieces
    fine: list[Ints] = field(default_factory=list)  # [8, t] pieces

    def extend(self, said: Speech) -> None:
        self.semantic += said.semantic
        self.coarse += said.coarse
        self.fine += said.fine

    def history_prompt(self) -> HistoryPrompt:
        """All of it as a history prompt."""
        return HistoryPrompt(
            np.concatenate(self.semantic), np.concatenate(self.coarse, axis=1), np.concatenate(self.fine, axis=1)
        )


class Slots:
    """A stream's KV slots: freed at the end, whatever happens, and before if nobody needs them any more."""

    def __init__(self, stages: Stages, stream: int):
        self._stages, self.stream = stages, stream
        self._freed: Future[None] | None = None

    def take(self) -> int:
        """The key, for calls that fill them."""
        self._freed = None
        return self.stream

    def free_soon(self, worker: Executor) -> None:
        """By `worker`, while the caller goes on. No call for them may be under way."""
        self._freed = worker.submit(self._stages.release, self.stream)

    def free(self) -> None:
        """If that has not been done. Raises what releasing raises."""
        if self._freed is None or self._freed.cancelled() or self._freed.exception():
            self._stages.release(self.stream)


@dataclass(frozen=True)
class Utterance:
    """One sentence to say."""

    text: str
    seed: int
    voice: HistoryPrompt | None
    options: SpeechOptions
    max_seconds: float
    slots: Slots
    before_s: float  # of audio that its listener has had before it; 0: somebody waits for the first
    is_last: bool  # of its text


@dataclass(frozen=True)
class Pipeline:
    """The four stages of a checkpoint, wired."""

    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    stages: Stages
    schedule: Schedule
    on_guard: Callable[[str, str], None] = lambda action, fault: None  # told of what a guard did, and why

    def __post_init__(self) -> None:
        self.schedule.check(self.checkpoint)

    def stream(
        self,
        text: str,
        options: SpeechOptions,
        voice: HistoryPrompt | None = None,
        stream: int = 0,
        speech: Speech | None = None,
        speakers: Mapping[str, HistoryPrompt | None] | None = None,
    ) -> Iterator[Floats]:
        """Chunks of samples [n] of a text, sentence after sentence, with a short pause between two, which is a chunk by itself: the second
        is made while a player is silent.

        Every sentence has `voice` as its history; without one, the first sentence's own speech becomes the voice of the
        rest. speakers: the same for each speaker whose turns the text marks. stream: key of the KV caches (0 for none),
        freed at the end whatever happens. speech, if given, collects what was generated, 3 kB a second; without it, memory
        does not grow with the text. Raises BadRequest for a blank text, NothingSaid if no sentence gave any audio.
        """
        voices = {"": voice, **(speakers or {})}
        language = choose_language(options.language, voice.language if voice else None, text)
        sentences = self.tokenizer.split(check_text(text), language, options.normalize, tuple(speakers or ()))
        n_samples, rate, shortest_s = 0, self.checkpoint.codec.sample_rate, 1 / self.checkpoint.semantic.rate_hz
        slots = Slots(self.stages, stream)
        try:
            for index, (sentence, is_last) in enumerate(_knowing_the_last(sentences)):
                seconds_left = options.max_seconds - n_samples / rate
                if n_samples and seconds_left < shortest_s:
                    break
                seed, voice = sentence_seed(options.seed, index), voices[sentence.speaker]
                before_s = options.in_hand_s + n_samples / rate
                max_seconds = min(seconds_left, self.schedule.sentence_s(index))
                asked = Utterance(sentence.text, seed, voice, options, max_seconds, slots, before_s, is_last)
                said = Speech()
                for chunk in (self._say_guarded if options.guard else self._say)(asked, said):
                    yield chunk
                    n_samples += len(chunk)
                if not said.fine:
                    continue
                voices[sentence.speaker] = voice or said.history_prompt()
                if speech is not None:
                    speech.extend(said)
                pause = self._pause(sentence.pause)
                if is_last or options.max_seconds - (n_samples + len(pause)) / rate < shortest_s:
                    break
                if len(pause):
                    yield pause
                    n_samples += len(pause)
            if not n_samples:
                raise NothingSaid("the model ended before it said anything; try another seed, voice or text")
        finally:
            slots.free()

    def speak(self, text: str, options: SpeechOptions, voice: HistoryPrompt | None = None) -> Floats:
        """All samples [n] of a text at once: the stream's chunks, joined."""
        return np.concatenate(list(self.stream(text, options, voice)))

    def _say_guarded(self, asked: Utterance, said: Speech) -> Iterator[Floats]:
        """`_say` with another try, or a cut, where it goes wrong; `said` collects it unless it was cut for how it sounds."""
        for n_before in range(N_TRIES):
            guard = Guard(asked.text, self.checkpoint, is_last_try=n_before == N_TRIES - 1)
            seed = sentence_seed(asked.seed, n_before) if n_before else asked.seed
            tried = Speech()
            with closing(self._say(replace(asked, seed=seed), tried, guard)) as chunks:
                yield from guard.listen(chunks)
            if not guard.is_hopeless:
                break
            self.on_guard(RETRIED, str(guard.fault))
        if guard.fault:
            self.on_guard(CUT, guard.fault)
        if guard.fault in (None, RUNAWAY):
            said.extend(tried)

    def _say(self, asked: Utterance, said: Speech, guard: Guard | None = None) -> Generator[Floats, None, None]:
        """Chunks of samples of one sentence; `said` collects its tokens and codes. guard: may end it early."""
        layouts, stages, options, voice = self.checkpoint, self.stages, asked.options, asked.voice
        sampling = options.sampling(asked.seed)
        prompt = semantic_prompt(self.tokenizer.encode(asked.text), voice, layouts.semantic)
        max_seconds = min(asked.max_seconds, guard.max_seconds if guard else math.inf)
        watch = guard.watch if guard else None
        waits = not asked.before_s and options.streaming  # somebody, for the first audio
        schedule = self.schedule.behind(asked.before_s)
        if not options.streaming:
            schedule = self.schedule.offline(is_guarded=guard is not None)
        knows_all_first = (guard and not waits) or (not options.streaming and schedule.offline_coarse_windows > 1)
        stream = asked.slots.take()
        nobody_waits = Event()  # from the first audio on
        if not waits:
            nobody_waits.set()

        def may_go_ahead() -> bool:
            return schedule.ahead_at_once or nobody_waits.is_set()

        draws = Draws(asked.seed, layouts.fine)
        with Workers() as workers:
            begin_draws = partial(workers.semantic.submit, draws.begin) if options.streaming else lambda: None
            semantic = SemanticTokens(
                prompt, layouts.semantic, sampling, max_seconds, schedule, stages, stream, workers.semantic,
                watch, may_go_ahead,
            )  # fmt: skip
            if knows_all_first:
                semantic.ensure(layouts.semantic.max_new_tokens)  # a guard looks at all of it before any is said
                if guard and guard.is_hopeless:
                    return
            windows = generate_coarse(
                semantic, voice, layouts.coarse, sampling, options.lookahead, schedule, stages, stream,
                may_chain=nobody_waits.is_set, meanwhile=begin_draws,
            )  # fmt: skip
            upcoming = Ahead(windows, workers.coarse, schedule.coarse_ahead, may_go_ahead)
            coarse = _collect(upcoming, said.coarse)
            if schedule.ahead_from_window:
                coarse = _behind_first(coarse, semantic.begin)
            if asked.is_last:
                coarse = _then(coarse, partial(asked.slots.free_soon, workers.coarse))
            if options.streaming:
                codes = generate_fine(
                    coarse, voice, layouts.fine, asked.seed, options.fine_temperature, schedule, stages, draws
                )
            else:
                codes = self._offline(coarse, voice, asked.seed, options.fine_temperature, schedule)
            for chunk in decode_audio(_collect(codes, said.fine), stages):
                if not nobody_waits.is_set():
                    nobody_waits.set()
                    upcoming.begin()  # before this chunk is sent, for it may be held
                yield chunk
        said.semantic.append(semantic.tokens)

    def _offline(
        self, coarse: Iterator[Ints], voice: HistoryPrompt | None, seed: int, temperature: float, schedule: Schedule
    ) -> Iterator[Ints]:
        pieces = list(coarse)
        if pieces:
            known, layout, n = np.concatenate(pieces, axis=1), self.checkpoint.fine, schedule.offline_fine_windows
            yield fill_offline(known, voice, layout, seed, temperature, self.stages, n)

    def _pause(self, length: float) -> Floats:
        """Silence. length: a multiple of the schedule's sentence_pause_s."""
        return np.zeros(round(length * self.schedule.sentence_pause_s * self.checkpoint.codec.sample_rate), np.float32)


def choose_voice(
    name: str | None, prompts: Mapping[str, np.ndarray], voices: dict[str, HistoryPrompt], checkpoint: Checkpoint
) -> HistoryPrompt | None:
    """The history prompt that a request names or carries, or None.

    prompts: the request's semantic_prompt, coarse_prompt, fine_prompt arrays, as far as given. Raises BadRequest.
    """
    if not prompts:
        return find_voice(voices, name) if name else None
    if name:
        raise BadRequest("give a voice or a history prompt, not both")
    missing = {"semantic_prompt", "coarse_prompt", "fine_prompt"} - set(prompts)
    if missing:
        raise BadRequest(f"a history prompt has three arrays; {sorted(missing)[0]} is missing")
    return HistoryPrompt.check(prompts["semantic_prompt"], prompts["coarse_prompt"], prompts["fine_prompt"], checkpoint)


def _knowing_the_last(sentences: Iterator[Sentence]) -> Iterator[tuple[Sentence, bool]]:
    """Each sentence, and whether it is the last one."""
    before = next(sentences, None)
    while before is not None:
        sentence, before = before, next(sentences, None)
        yield sentence, before is None


def _behind_first(pieces: Iterator[Ints], begin: Callable[[], None]) -> Iterator[Ints]:
    """The same pieces, and `begin` once the first is there."""
    for index, piece in enumerate(pieces):
        if not index:
            begin()
        yield piece


def _then(pieces: Iterator[Ints], when_over: Callable[[], None]) -> Iterator[Ints]:
    """The same pieces, and when_over behind the last."""
    yield from pieces
    when_over()


def _collect(pieces: Iterator[Ints], into: list[Ints]) -> Iterator[Ints]:
    """The same pieces, remembered."""
    for piece in pieces:
        into.append(piece)
        yield piece
