"""History prompts: what is accepted, and what a caller hears otherwise."""

import numpy as np
import pytest

from barkstream.options import BadRequest
from barkstream.pipeline import choose_voice
from barkstream.voices import HistoryPrompt, find_voice


def arrays(voices):
    voice = voices["heart_0"]
    return dict(semantic_prompt=voice.semantic, coarse_prompt=voice.coarse, fine_prompt=voice.fine)


def changed(voices, name, change):
    given = arrays(voices)
    return {**given, name: change(given[name])}


def test_an_unknown_voice_names_the_nearest(voices):
    with pytest.raises(BadRequest, match=r"no voice 'hart_0'; did you mean 'heart_0'.*4 voices: barkstream voices"):
        find_voice(voices, "hart_0")


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("semantic_prompt", lambda a: a[None], r"semantic_prompt must have the shape \[n\]"),
        ("semantic_prompt", lambda a: a[:0], "not be empty"),
        ("semantic_prompt", lambda a: a.astype(np.float32), "whole numbers, got float32"),
        ("semantic_prompt", lambda a: a + 10_000, "ids from 0 to 767"),
        ("semantic_prompt", lambda a: a - 10_000, "ids from 0 to 767"),
        (
            "semantic_prompt",
            lambda a: a[:50],
            "cover the same time: 50 semantic tokens go with about 75 frames, got 371",
        ),
        (
            "coarse_prompt",
            lambda a: a[:1],
            r"coarse_prompt must have the shape \[2, n\] and not be empty, got \[1, 371\]",
        ),
        ("coarse_prompt", lambda a: a + 1024, "ids from 0 to 1023"),
        ("fine_prompt", lambda a: a[:, :-1], "as many frames, got 371 and 370"),
        ("fine_prompt", lambda a: a.T, r"fine_prompt must have the shape \[8, n\]"),
    ],
)
def test_a_history_prompt_that_does_not_fit_is_refused(pipeline, voices, name, change, said):
    with pytest.raises(BadRequest, match=said):
        choose_voice(None, changed(voices, name, change), {}, pipeline.checkpoint)


def test_a_history_prompt_needs_all_three_arrays(pipeline, voices):
    given = arrays(voices)
    del given["fine_prompt"]
    with pytest.raises(BadRequest, match="fine_prompt is missing"):
        choose_voice(None, given, {}, pipeline.checkpoint)


def test_a_voice_and_a_history_prompt_exclude_each_other(pipeline, voices):
    with pytest.raises(BadRequest, match="not both"):
        choose_voice("heart_0", arrays(voices), voices, pipeline.checkpoint)


def test_a_saved_voice_loads_as_it_was(pipeline, voices, tmp_path):
    voices["heart_0"].save(tmp_path / "mine.npz")
    loaded = HistoryPrompt.load(tmp_path / "mine.npz", pipeline.checkpoint)
    np.testing.assert_array_equal(loaded.fine, voices["heart_0"].fine)
