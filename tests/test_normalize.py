"""What is written in digits is said in words."""

import pytest

from barkstream.languages import LANGUAGES
from barkstream.normalize import WORDS, normalize


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("1,234 eggs", "one thousand two hundred thirty-four eggs"),
        ("3.14", "three point one four"),
        ("-5 degrees", "minus five degrees"),
        ("007", "zero zero seven"),
        ("in 1999", "in nineteen ninety-nine"),
        ("the 21st of May", "the twenty-first of May"),
        ("2024-03-05", "March fifth, twenty twenty-four"),
        ("at 5:05", "at five oh five"),
        ("5% & 10-20", "five percent and ten to twenty"),
        ("$3.50", "three dollars fifty"),
        ("$1", "one dollar"),
        ("£2.5 million", "two point five million pounds"),
        ("No. It is No. 5.", "No. It is Number five."),
        ("Dr. Who vs. Mr. X", "Doctor Who versus Mister X"),
    ],
)
def test_english_is_read_as_one_says_it(written, said):
    assert normalize(written, "en") == said


@pytest.mark.parametrize(
    ("language", "written", "said"),
    [
        ("de", "Am 3. Oktober 1990 um 17:30 Uhr", "Am dritten Oktober neunzehnhundertneunzig um siebzehn Uhr dreißig"),
        ("de", "1.234,56", "eintausendzweihundertvierunddreißig Komma fünf sechs"),
        ("es", "3,50 €", "tres euros cincuenta"),
        ("fr", "le 1er, 1 234 livres", "le premier, mille deux cent trente-quatre livres"),
        ("hi", "5%", "पाँच प्रतिशत"),
        ("it", "3,50 € 2024-03-05", "tre euro cinquanta cinque marzo duemilaventiquattro"),
        ("ja", "2024年に¥500", "二千二十四年に五百円"),
        ("ko", "5% 17:30", "오 퍼센트 십칠시 삼십분"),
        ("pl", "3,14", "trzy przecinek jeden cztery"),
        ("pt", "R$ 5,00", "cinco Reais brasileiros"),
        ("ru", "100 ₽", "сто российских рублей"),
        ("tr", "%5 ve 1.234", "yüzde beş ve bin iki yüz otuz dört"),
        ("zh", "2024年，5%", "二零二四年，百分之五"),
    ],
)
def test_every_language_of_bark_has_its_words(language, written, said):
    assert normalize(written, language) == said


def test_all_of_barks_languages_are_there():
    assert set(WORDS) == set(LANGUAGES)


@pytest.mark.parametrize("text", ["[laughs] ♪ la la ♪", "MP3 v1.2.3", "10.0.0.1", "555-1234", "2024-13-45", "1/2", ""])
def test_what_is_no_number_stays_as_it_is(text):
    assert normalize(text, "en") == text


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_negative_number_says_so(language):
    assert normalize("-5", language) != normalize("5", language)


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_digit_is_left_of_a_plain_number(language):
    for number in ("0", "7", "21", "100", "2000", "1999", "123456", "999999999999", "1" * 30):
        assert not any(mark.isascii() and mark.isdigit() for mark in normalize(number, language))
