"""History prompts: what is accepted, and what a caller hears otherwise."""

import json

import numpy as np
import pytest

from barkstream.options import BadRequest
from barkstream.pipeline import choose_voice
from barkstream.voices import (
    PARTS,
    HistoryPrompt,
    choose_speakers,
    find_voice,
    list_voices,
    load_voices,
    match_voice,
    suno_presets,
)


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
            "cover the same time: 50 semantic tokens go with about 75 frames, got {n}",
        ),
        (
            "coarse_prompt",
            lambda a: a[:1],
            r"coarse_prompt must have the shape \[2, n\] and not be empty, got \[1, {n}\]",
        ),
        ("coarse_prompt", lambda a: a + 1024, "ids from 0 to 1023"),
        ("fine_prompt", lambda a: a[:, :-1], "as many frames, got {n} and {n_less}"),
        ("fine_prompt", lambda a: a.T, r"fine_prompt must have the shape \[8, n\]"),
    ],
)
def test_a_history_prompt_that_does_not_fit_is_refused(pipeline, voices, name, change, said):
    n = arrays(voices)["coarse_prompt"].shape[1]
    said = said.replace("{n}", str(n)).replace("{n_less}", str(n - 1))
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


# --- folders of voices -----------------------------------------------------------------------------------------------


def write_npy(folder, name, voice):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for part, array in zip(PARTS, (voice.semantic, voice.coarse, voice.fine), strict=True):
        np.save(folder / f"{name}_{part}.npy", array)


def test_sunos_and_hugging_faces_layouts_are_the_same_voices(voices, pipeline, tmp_path):
    voice = voices["heart_0"]
    voice.save(tmp_path / "suno/v2/de_speaker_3.npz")
    write_npy(tmp_path / "plain", "speaker_embeddings/v2/de_speaker_3", voice)
    write_npy(tmp_path / "listed", "somewhere/else", voice)
    files = {part: f"somewhere/else_{part}.npy" for part in PARTS}
    listing = {"repo_or_path": "suno/bark", "v2/de_speaker_3": files}
    (tmp_path / "listed/speaker_embeddings_path.json").write_text(json.dumps(listing))
    for layout in ("suno", "plain", "listed"):
        loaded = load_voices(tmp_path / layout, pipeline.checkpoint)
        assert list(loaded) == ["v2/de_speaker_3"]
        assert loaded["v2/de_speaker_3"].language == "de"
        np.testing.assert_array_equal(loaded["v2/de_speaker_3"].fine, voice.fine)


def test_a_voice_that_does_not_fit_is_named_at_load(pipeline, voices, tmp_path):
    voices["heart_0"].save(tmp_path / "good.npz")
    given = arrays(voices)
    np.savez(tmp_path / "bad.npz", **{**given, "semantic_prompt": given["semantic_prompt"] + 10_000})
    with pytest.raises(BadRequest, match=r"bad\.npz is no voice for this checkpoint: semantic_prompt must hold ids"):
        load_voices(tmp_path, pipeline.checkpoint)


@pytest.mark.parametrize("content", [b"", b"not a voice", b"PK\x03\x04"])
def test_a_file_that_is_none_is_one_sentence(pipeline, tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(BadRequest, match="x.npz is no voice"):
        HistoryPrompt.load(tmp_path / "x.npz", pipeline.checkpoint)


def test_sunos_presets_are_in_its_package():
    names = list_voices(suno_presets())
    assert len(names) == 141 + 130  # of the first version and of v2
    assert match_voice(names, "V2 / EN Speaker-9") == "v2/en_speaker_9"
    assert match_voice(names, "en speaker 9") == "en_speaker_9"  # the first version's


# --- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "announcer",
    "de_speaker_3",
    "v2/de_speaker_3",
    "v2/en_speaker_6",
    "v2/en_speaker_9",
    "mine/anna",
    "yours/anna",
]


@pytest.mark.parametrize(
    "wanted", ["v2/en_speaker_9", "en speaker 9", "EN-Speaker-9", "v2 en speaker 9", "en_speaker_9"]
)
def test_a_voice_is_found_however_it_is_spelled(wanted):
    assert match_voice(NAMES, wanted) == "v2/en_speaker_9"


def test_an_exact_name_goes_before_a_like_one():
    assert match_voice(NAMES, "de_speaker_3") == match_voice(NAMES, "DE Speaker 3") == "de_speaker_3"


@pytest.mark.parametrize(
    ("wanted", "hint"),
    [
        ("Anna", "did you mean 'mine/anna' or 'yours/anna'?"),
        ("en speaker 99", "did you mean 'v2/en_speaker_9'"),
        ("ütf", "7 voices: barkstream voices"),
        ("--", "no voice '--'"),
    ],
)
def test_a_name_that_is_none_or_two_gets_suggestions(wanted, hint):
    with pytest.raises(BadRequest) as refused:
        match_voice(NAMES, wanted)
    assert hint in str(refused.value)


def test_speakers_have_names_of_their_own_and_voices_that_exist(voices):
    speakers = choose_speakers(["A = Heart 0", "B"], voices)
    assert speakers == {"A": voices["heart_0"], "B": None}
    for wrong, said in [
        (["A", "a"], "names of their own"),
        (["=heart_0"], "names of their own"),
        (["A=hart"], "no voice 'hart'"),
        (list(map(str, range(33))), "at most 32 speakers"),
    ]:
        with pytest.raises(BadRequest, match=said):
            choose_speakers(wrong, voices)
