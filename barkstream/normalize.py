"""Numbers, dates, times, amounts of money and abbreviations as the words that one says, in Bark's 13 languages.

Numbers are spelled by the rules of Unicode's CLDR (unicode-rbnf), months and currencies are named by it too (Babel). Without
grammar: a number is in its basic form, whatever case or gender its noun has.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from functools import cache

from babel.dates import format_date, get_month_names
from babel.numbers import get_currency_name
from unicode_rbnf import RbnfEngine


@dataclass(frozen=True)
class Words:
    """What a language needs beside its numbers. {} stands for a number in words."""

    point: str  # between a number's whole part and its decimals
    percent: str
    span: str  # from {} to {}
    ampersand: str
    minus: str
    clock: str = "{} {}"  # hours and minutes
    group: str = r"\."  # between thousands, in digits
    decimal: str = ","
    abbreviations: dict[str, str] = field(default_factory=dict)


WORDS = {
    "de": Words("Komma", "{} Prozent", "{} bis {}", "und", "minus", "{} Uhr {}", abbreviations={
        "z. B.": "zum Beispiel", "z.B.": "zum Beispiel", "d. h.": "das heißt", "d.h.": "das heißt", "usw.": "und so weiter",
        "bzw.": "beziehungsweise", "ca.": "circa", "Nr.": "Nummer", "Dr.": "Doktor", "Prof.": "Professor", "Str.": "Straße",
    }),
    "en": Words("point", "{} percent", "{} to {}", "and", "minus", group=",", decimal=r"\.", abbreviations={
        "Mr.": "Mister", "Mrs.": "Missus", "Ms.": "Miz", "Dr.": "Doctor", "Prof.": "Professor", "Jr.": "Junior",
        "Sr.": "Senior", "No.": "Number", "vs.": "versus", "e.g.": "for example", "i.e.": "that is", "approx.": "about",
    }),
    "es": Words("coma", "{} por ciento", "{} a {}", "y", "menos", abbreviations={
        "Sr.": "Señor", "Sra.": "Señora", "Dr.": "Doctor", "Dra.": "Doctora", "Ud.": "usted", "Uds.": "ustedes",
    }),
    "fr": Words("virgule", "{} pour cent", "{} à {}", "et", "moins", "{} heures {}", group=" ", abbreviations={
        "M.": "Monsieur", "Mme": "Madame", "Mlle": "Mademoiselle", "Dr": "Docteur", "p. ex.": "par exemple",
    }),
    "hi": Words("दशमलव", "{} प्रतिशत", "{} से {}", "और", "ऋण", group=",", decimal=r"\."),
    "it": Words("virgola", "{} per cento", "da {} a {}", "e", "meno", abbreviations={
        "Sig.": "Signor", "sig.": "signor", "Dott.": "Dottor", "dott.": "dottor", "ecc.": "eccetera",
    }),
    "ja": Words("点", "{}パーセント", "{}から{}", "と", "マイナス", "{}時{}分", group=",", decimal=r"\."),
    "ko": Words("점", "{} 퍼센트", "{}에서 {}", "그리고", "마이너스", "{}시 {}분", group=",", decimal=r"\."),
    "pl": Words("przecinek", "{} procent", "{} do {}", "i", "minus", group=" ", abbreviations={
        "np.": "na przykład", "itd.": "i tak dalej", "dr": "doktor", "prof.": "profesor", "ul.": "ulica",
    }),
    "pt": Words("vírgula", "{} por cento", "{} a {}", "e", "menos", abbreviations={
        "Sr.": "Senhor", "Sra.": "Senhora", "Dr.": "Doutor", "Dra.": "Doutora", "etc.": "et cetera",
    }),
    "ru": Words("запятая", "{} процентов", "{} до {}", "и", "минус", group=" ", abbreviations={
        "т. д.": "так далее", "т. е.": "то есть", "т.д.": "так далее", "т.е.": "то есть", "др.": "другие",
    }),
    "tr": Words("virgül", "yüzde {}", "{} ila {}", "ve", "eksi", abbreviations={"Dr.": "Doktor", "Prof.": "Profesör", "vb.": "ve benzeri"}),
    "zh": Words("点", "百分之{}", "{}到{}", "和", "负", "{}点{}分", group=",", decimal=r"\."),
}  # fmt: skip

CURRENCIES = {
    "R$": "BRL", "$": "USD", "€": "EUR", "£": "GBP", "¥": "JPY", "₹": "INR", "₩": "KRW", "₽": "RUB", "₺": "TRY", "zł": "PLN",
}  # fmt: skip
ORDINALS = {  # how digits show that they are an ordinal number, and the rule that spells it
    "en": (re.compile(r"\b(\d+)(?:st|nd|rd|th)\b"), "spellout-ordinal"),
    "es": (re.compile(r"\b(\d+)º"), "spellout-ordinal-masculine"),
    "fr": (re.compile(r"\b(\d+)(?:er|e|ème)\b"), "spellout-ordinal-masculine"),
    "it": (re.compile(r"\b(\d+)º"), "spellout-ordinal-masculine"),
    "pt": (re.compile(r"\b(\d+)º"), "spellout-ordinal-masculine"),
}
DATES = (
    re.compile(r"\b(?P<y>\d{4})-(?P<m>\d\d)-(?P<d>\d\d)\b"),
    re.compile(r"\b(?P<d>\d\d?)\.(?P<m>\d\d?)\.(?P<y>\d{4})\b"),
)
CLOCK = re.compile(r"(?<![\d:])([01]?\d|2[0-3]):([0-5]\d)(?![\d:])(?: Uhr\b)?")
BEFORE_NUMBER = {"No.": r"(?= ?\d)"}  # elsewhere it is a word
AMPERSAND = re.compile(r"(?<=\s)&(?=\s)")
N_MOST_DIGITS = 15  # a longer number is read digit by digit, and so is one that begins with 0
YEARS = range(1100, 2100)

Rule = tuple[re.Pattern[str], Callable[[re.Match[str]], str]]


def normalize(text: str, language: str) -> str:
    """The text with numbers and abbreviations as words. A language that is none of Bark's: the text as it is."""
    return _reader(language).read(text) if language in WORDS else text


class Reader:
    """The rules of one language, in the order in which they apply."""

    def __init__(self, language: str):
        self._language, self._words = language, WORDS[language]
        self._engine = RbnfEngine.for_language(language)
        self._cardinal = "spellout-cardinal" if language == "zh" else "spellout-numbering"
        self._gap = "" if language in ("ja", "zh") else " "
        words, symbols = self._words, "|".join(map(re.escape, CURRENCIES))
        number = rf"\d{{1,3}}(?:{words.group}\d{{3}})+(?:{words.decimal}\d+)?|\d+(?:{words.decimal}\d+)?"
        free = (
            rf"(?<![A-Za-z\d])(?<!\d[.,:/-])({number})(?![A-Za-z\d]|[.,:/-]\d)"  # no part of a word, version or address
        )
        scale = r"((?: (?:thousand|[mbtr]{1,2}illion))?)"
        money: list[Rule] = [
            (re.compile(rf"({symbols}) ?({number}){scale}"), lambda m: self._money(m[2], m[3], m[1])),
            (re.compile(rf"{free}() ?({symbols})"), lambda m: self._money(m[1], m[2], m[3])),
        ]
        self._rules: list[Rule] = [
            *((_abbreviation(short), _constant(full)) for short, full in words.abbreviations.items()),
            (AMPERSAND, _constant(words.ampersand)),
            *((pattern, self._date) for pattern in DATES),
            (CLOCK, self._clock),
            *(money if words.decimal != "," else reversed(money)),  # "3,50 € 2024"
            (re.compile(rf"{free} ?[%％]"), lambda m: words.percent.format(self._number(m[1]))),
            (re.compile(rf"%{free}"), lambda m: words.percent.format(self._number(m[1]))),
            (re.compile(r"(\d{4})(?=年)"), lambda m: self._digits(m[1]) if language == "zh" else self._number(m[1])),
            (re.compile(r"(?<![\w-])(\d{1,4})[-–](\d{1,4})(?![\w-])"), self._span),
            *self._ordinal_rules(),
            (re.compile(rf"(?<![\w-])[-−]{free}"), lambda m: self._gap.join([words.minus, self._number(m[1])])),
            (re.compile(free), lambda m: self._number(m[1])),
        ]  # fmt: skip

    def read(self, text: str) -> str:
        for pattern, words in self._rules:
            text = pattern.sub(words, text)
        return text

    def _ordinal_rules(self) -> list[Rule]:
        if self._language == "de":  # only before a month is a full stop a sign of an ordinal
            months = "|".join(get_month_names("wide", locale="de").values())
            return [(re.compile(rf"\b(\d+)\. (?={months})"), lambda m: self._ordinal(m[1], "spellout-ordinal-n") + " ")]
        pattern, rule = ORDINALS.get(self._language, (None, ""))
        return [(pattern, lambda m: self._ordinal(m[1], rule))] if pattern else []

    def _spell(self, n: int) -> str:
        return str(self._engine.format_number(n, ruleset_names=[self._cardinal]).text)

    def _ordinal(self, digits: str, rule: str) -> str:
        return str(self._engine.format_number(int(digits), ruleset_names=[rule]).text)

    def _number(self, digits: str) -> str:
        """A number with its group and decimal signs."""
        whole, _, decimals = re.sub(self._words.group, "", digits).replace(",", ".").partition(".")
        if digits.isdigit() and len(digits) == 4 and int(digits) in YEARS and self._language in ("en", "de"):
            return str(self._engine.format_number(int(digits), ruleset_names=["spellout-numbering-year"]).text)
        if len(whole) > N_MOST_DIGITS or (len(whole) > 1 and whole.startswith("0")):
            return self._digits(whole)
        spelled = self._spell(int(whole))
        return self._gap.join([spelled, self._words.point, self._digits(decimals)]) if decimals else spelled

    def _digits(self, digits: str) -> str:
        return self._gap.join(self._spell(int(digit)) for digit in digits)

    def _date(self, match: re.Match[str]) -> str:
        try:
            day = date(int(match["y"]), int(match["m"]), int(match["d"]))
        except ValueError:
            return match[0]
        if self._language == "en":
            month, number = format_date(day, "MMMM", "en"), self._ordinal(match["d"], "spellout-ordinal")
            return f"{month} {number}, {match['y']}"
        return format_date(day, "long", self._language)  # its numbers are for the rules that follow

    def _clock(self, match: re.Match[str]) -> str:
        hours, minutes = int(match[1]), int(match[2])
        if minutes == 0:
            return self._words.clock.format(self._spell(hours), "").strip().removesuffix("分")
        spelled = f"oh {self._spell(minutes)}" if self._language == "en" and minutes < 10 else self._spell(minutes)
        return self._words.clock.format(self._spell(hours), spelled)

    def _money(self, amount: str, scale: str, symbol: str) -> str:
        whole, _, cents = re.sub(self._words.group, "", amount).replace(",", ".").partition(".")
        code = "CNY" if symbol == "¥" and self._language == "zh" else CURRENCIES[symbol]
        name = get_currency_name(code, count=2 if scale else int(whole), locale=self._language)
        if self._language == "en":
            name = name.split()[-1]  # dollars, not US dollars
        if scale or len(cents) not in (0, 2):
            return f"{self._number(amount)}{scale} {name}"
        said = [self._spell(int(whole)), name, *([self._spell(int(cents))] if int(cents or 0) else [])]
        return self._gap.join(said)

    def _span(self, match: re.Match[str]) -> str:
        first, last = match[1], match[2]
        if int(first) >= int(last) or (len(first) != len(last) and len(last) > 2):
            return match[0]  # a score or a telephone number
        return self._words.span.format(self._number(first), self._number(last))


@cache
def _reader(language: str) -> Reader:
    return Reader(language)


def _abbreviation(short: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(short)}{BEFORE_NUMBER.get(short, '')}(?!\w)")


def _constant(text: str) -> Callable[[re.Match[str]], str]:
    return lambda match: text
