"""Which language a text is read in."""

import pytest

from barkstream.languages import choose_language, language_of_voice


@pytest.mark.parametrize(
    ("name", "language"),
    [("v2/de_speaker_3", "de"), ("en_speaker_0", "en"), ("zh/anna", "zh"), ("announcer", None), ("eno_1", None)],
)
def test_a_voices_name_begins_with_its_language(name, language):
    assert language_of_voice(name) == language


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("今日はいい天気ですね。", "ja"),
        ("今天天气很好。", "zh"),
        ("안녕하세요.", "ko"),
        ("यह एक वाक्य है।", "hi"),
        ("Добрый день!", "ru"),
        ("The word привет means hello in Russian, they say.", "en"),
        ("Bonjour tout le monde.", "en"),
        ("1, 2, 3!", "en"),
    ],
)
def test_a_script_tells_the_language_and_latin_letters_do_not(text, language):
    assert choose_language(None, None, text) == language


def test_what_is_asked_for_goes_before_the_script_and_that_before_the_voice():
    assert choose_language("de", "fr", "Добрый день!") == "de"
    assert choose_language(None, "fr", "Добрый день!") == "ru"
    assert choose_language(None, "fr", "Bonjour !") == "fr"
