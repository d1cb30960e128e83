"""Text in, chunks of speech out: the straight line, as one generator. Start reading here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from barkstream.ahead import Workers, ahead
from barkstream.coarse import generate_coarse
from barkstream.codec import decode_audio
from barkstream.fine import fill_offline, generate_fine
from barkstream.options import BadRequest, Schedule, SpeechOptions
from barkstream.sampling import Floats, Ints, sentence_seed
from barkstream.semantic import SemanticTokens, semantic_prompt
from barkstream.stages import Stages
from barkstream.text import TextTokenizer, check_text
from barkstream.tokens import Checkpoint
from barkstream.voices import HistoryPrompt, find_voice

NO_SAMPLES = np.zeros(0, np.float32)


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


@dataclass(frozen=True)
class Pipeline:
    """The four stages of a checkpoint, wired."""

    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    stages: Stages
    schedule: Schedule

    def __post_init__(self) -> None:
        if self.schedule.chunk(0) < self.checkpoint.codec.min_first_chunk:
            raise ValueError(
                f"the first chunk must have at least {self.checkpoint.codec.min_first_chunk} frames: the codec reads that many"
            )
        if self.schedule.coarse_call % self.checkpoint.coarse.n_codebooks:
            raise ValueError(f"coarse_call must be a multiple of {self.checkpoint.coarse.n_codebooks}: whole frames")

    def stream(
        self,
        text: str,
        options: SpeechOptions,
        voice: HistoryPrompt | None = None,
        stream: int = 0,
        speech: Speech | None = None,
    ) -> Iterator[Floats]:
        """Chunks of samples [n] of a text, sentence after sentence, with a short pause between two.

        Every sentence has `voice` as its history; without one, the first sentence's own speech becomes the voice of the
        rest. stream: key of the KV caches (0 for none), freed at the end whatever happens. speech, if given, collects what
        was generated. Raises BadRequest for a blank text, NothingSaid if no sentence gave any audio.
        """
        sentences = self.tokenizer.split(check_text(text))
        speech = Speech() if speech is None else speech
        n_samples, pause = 0, NO_SAMPLES
        try:
            for index, sentence in enumerate(sentences):
                seconds_left = options.max_seconds - (n_samples + len(pause)) / self.checkpoint.codec.sample_rate
                if n_samples and seconds_left * self.checkpoint.semantic.rate_hz < 1:
                    break
                said = Speech()
                for chunk in self._say(sentence, index, voice, options, seconds_left, stream, said):
                    yield np.concatenate([pause, chunk])
                    n_samples += len(pause) + len(chunk)
                    pause = NO_SAMPLES
                if said.fine:
                    pause = self._pause()
                    voice = voice or said.history_prompt()
                    speech.extend(said)
            if not n_samples:
                raise NothingSaid("the model ended before it said anything; try another seed, voice or text")
        finally:
            self.stages.release(stream)

    def speak(self, text: str, options: SpeechOptions, voice: HistoryPrompt | None = None) -> Floats:
        """All samples [n] of a text at once: the stream's chunks, joined."""
        return np.concatenate(list(self.stream(text, options, voice)))

    def _say(
        self,
        sentence: str,
        index: int,
        voice: HistoryPrompt | None,
        options: SpeechOptions,
        max_seconds: float,
        stream: int,
        said: Speech,
    ) -> Iterator[Floats]:
        """Chunks of samples of one sentence; `said` collects its tokens and codes."""
        layouts, stages, seed = self.checkpoint, self.stages, sentence_seed(options.seed, index)
        schedule = self.schedule if options.streaming else self.schedule.offline()
        sampling = options.sampling(seed)
        prompt = semantic_prompt(self.tokenizer.encode(sentence), voice, layouts.semantic)
        with Workers() as workers:
            semantic = SemanticTokens(
                prompt, layouts.semantic, sampling, max_seconds, schedule, stages, stream, workers.semantic
            )
            coarse = generate_coarse(
                semantic, voice, layouts.coarse, sampling, options.lookahead, schedule, stages, stream
            )
            coarse = _collect(ahead(coarse, workers.coarse, schedule.coarse_ahead), said.coarse)
            if options.streaming:
                codes = generate_fine(coarse, voice, layouts.fine, seed, options.fine_temperature, schedule, stages)
            else:
                codes = self._offline(coarse, voice, seed, options.fine_temperature)
            yield from decode_audio(_collect(codes, said.fine), stages)
        said.semantic.append(semantic.tokens)

    def _offline(
        self, coarse: Iterator[Ints], voice: HistoryPrompt | None, seed: int, temperature: float
    ) -> Iterator[Ints]:
        pieces = list(coarse)
        if pieces:
            yield fill_offline(
                np.concatenate(pieces, axis=1), voice, self.checkpoint.fine, seed, temperature, self.stages
            )

    def _pause(self) -> Floats:
        return np.zeros(round(self.schedule.sentence_pause_s * self.checkpoint.codec.sample_rate), np.float32)


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


def _collect(pieces: Iterator[Ints], into: list[Ints]) -> Iterator[Ints]:
    """The same pieces, remembered."""
    for piece in pieces:
        into.append(piece)
        yield piece
