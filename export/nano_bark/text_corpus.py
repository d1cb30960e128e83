# ruff: noqa: B905, E501, SIM103, SIM115, SIM905
"""Build the training and held-out texts: WordNet examples/definitions, KJV verses, fortunes, the Jargon File,
word lists (all from Debian packages) and template sentences. Writes work/corpus.json.gz with, per utterance:
text, BERT char-token ids, hibari phoneme ids, and where known the token span of every phoneme."""

import gzip
import json
import os
import random
import re
import sys
from multiprocessing import Pool
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = os.environ.get("NANO_WORK", "work")
DEB = os.environ.get(
    "NANO_DEB", "debs"
)  # unpacked Debian packages: wordnet-base, fortunes, jargon-text, bible-kjv-text, word lists


OK = re.compile(r"^[A-Za-z0-9 .,!?;:'\"\-()&$%/]+$")


def clean(s):
    s = (
        s.replace("\u2019", "'")
        .replace("\u2018", "'")
        .replace("\u201c", '"')
        .replace("\u201d", '"')
        .replace("\u2014", ", ")
        .replace("--", ", ")
    )
    s = re.sub(r"[_*`]", "", s)
    s = re.sub(r"\s+", " ", s).strip()
    s = re.sub(r"\s+([,.;:!?])", r"\1", s)
    return s


def good(s, lo=12, hi=190):
    if not (lo <= len(s) <= hi and OK.match(s)):
        return False
    if sum(c.isupper() for c in s) > 0.25 * len(s):
        return False
    if re.search(r"[/()%&]|\.\.|[A-Za-z]\d|\d[A-Za-z]{3}|\b[A-Z]{2,}\b", s):
        return False
    return True


def cap(s):
    s = s.strip()
    s = s[0].upper() + s[1:] if s else s
    return s if s[-1:] in ".!?" else s + "."


def wordnet(rng):
    ex, df = [], []
    for pos in ("noun", "verb", "adj", "adv"):
        for line in open(f"{DEB}/wordnet-base/usr/share/wordnet/data.{pos}", encoding="latin1"):
            if line.startswith("  ") or "|" not in line:
                continue
            gloss = line.split("|", 1)[1].strip()
            for e in re.findall(r'"([^"]+)"', gloss):
                ex.append(cap(clean(e)))
            d = clean(re.sub(r'"[^"]*"', "", gloss).split(";")[0])
            d = re.sub(r"\([^)]*\)", "", d).strip(" ;,")
            if d:
                df.append((clean(line.split()[4].replace("_", " ")), clean(d)))
    ex = list(dict.fromkeys(e for e in ex if good(e, 10)))
    rng.shuffle(ex)
    defs = []
    for w, d in df:
        if pos and re.match(r"^[a-z ]+$", w) and good(d, 8, 150):
            k = rng.random()
            defs.append(
                cap(d)
                if k < 0.4
                else cap(f"{w} means {d}")
                if k < 0.6
                else cap(f"{w}, {d}")
                if k < 0.8
                else cap(f"the {w} is {d}")
            )
    defs = list(dict.fromkeys(d for d in defs if good(d)))
    rng.shuffle(defs)
    return ex, defs


def prose(rng):
    out = []
    root = f"{DEB}/fortunes/usr/share/games/fortunes"
    files = [os.path.join(root, f) for f in os.listdir(root) if "." not in f] + [
        f"{DEB}/fortunes-min/usr/share/games/fortunes/{f}" for f in ("fortunes", "literature", "riddles")
    ]
    txt = []
    for f in files:
        if os.path.exists(f) and not f.endswith("limerick"):
            for part in open(f, encoding="utf8", errors="ignore").read().split("\n%\n"):
                txt.append(re.sub(r"\n\s*--.*", "", part, flags=re.S))
    try:
        j = gzip.open(
            f"{DEB}/dict-jargon/usr/share/dictd/jargon.dict.dz", "rt", encoding="utf8", errors="ignore"
        ).read()
        txt += j.split("\n\n")
    except Exception as e:
        print("jargon", e)
    for t in txt:
        for s in re.split(r"(?<=[.!?])[\"')]*\s+(?=[A-Z\"])", clean(t)):
            s = s.strip(" \"'-")
            if good(s, 20) and s[0].isupper() and s[-1] in ".!?":
                out.append(s)
    out = list(dict.fromkeys(out))
    rng.shuffle(out)
    return out


def kjv(rng):
    out, cur = [], None
    for line in open(os.environ.get("NANO_KJV", "kjv.txt")):
        m = re.match(r"^\s+\d+ (.*)", line)
        if m:
            if cur:
                out.append(cur)
            cur = m.group(1)
        elif cur and line.strip() and not re.match(r"^[A-Z0-9][a-z ]* \d+$", line.strip()):
            cur += " " + line.strip()
    out = [clean(x).rstrip(",;:") for x in out]
    out = [cap(x) for x in out if good(x, 25)]
    out = list(dict.fromkeys(out))
    rng.shuffle(out)
    return out


ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()


def num(n):
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + ("" if n % 10 == 0 else " " + ONES[n % 10])
    if n < 1000:
        return ONES[n // 100] + " hundred" + ("" if n % 100 == 0 else " and " + num(n % 100))
    return num(n // 1000) + " thousand" + ("" if n % 1000 == 0 else " " + num(n % 1000))


NAMES = "Suno Bark Anna Ben Carla David Emma Frank Grace Henry Irene Jack Kate Leo Maria Nina Oscar Paul Quinn Rose Sam Tom Uma Victor Wendy Xavier Yasmin Zoe Alice Robert Linda Michael Susan James Mary John Patricia Jennifer William Elizabeth Barbara Richard Joseph Jessica Thomas Sarah Charles Karen Daniel Matthew Anthony Lisa Mark Nancy Steven Betty Andrew Sandra Joshua Ashley Kevin Brian Emily George Donna Edward Michelle Ronald Carol Timothy Amanda Jason Melissa Jeffrey Deborah Ryan Stephanie Jacob Rebecca Gary Laura Nicholas Helen Eric Sharon Jonathan Cynthia Stephen Kathleen Larry Amy Justin Angela Scott Shirley Brandon Ruth Benjamin".split()
FOODS = "pizza|pasta|soup|fresh bread|chocolate cake|apple pie|orange juice|fried rice|a salad|a sandwich|green tea|black coffee|ice cream|cheese|tomatoes|pancakes|roast chicken|noodles|strawberries|cookies|potatoes|a glass of water|hot chocolate|scrambled eggs|fish and chips".split(
    "|"
)
HOBBY = "reading books|playing chess|playing tic tac toe|riding my bicycle|listening to music|watching movies|cooking dinner|playing the guitar|taking pictures|swimming in the lake|walking in the park|learning languages|painting|dancing|running in the morning|playing video games|writing code|gardening|travelling|telling jokes|hiking in the mountains|drinking coffee|sleeping late|talking to machines".split(
    "|"
)
CITY = "London|Paris|New York|Berlin|Tokyo|Chicago|Boston|Madrid|Rome|Sydney|Toronto|San Francisco|Seattle|Dublin|Amsterdam|Vienna|Mumbai|Singapore|Los Angeles|Edinburgh|Manchester|California|Texas|Germany|France|Japan|India|China|Canada|Australia".split(
    "|"
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ORD = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth".split()
WEATHER = "sunny|cloudy|rainy|windy|very cold|very hot|foggy|stormy|snowing|warm and dry|beautiful".split("|")
ADJ = "big small red green blue old new happy sad quick lazy brown little beautiful strange quiet loud bright dark heavy empty clever famous friendly gentle hungry tired angry purple golden silver warm cold young broken wooden modern ancient simple complicated".split()
ANIM = "fox dog cat horse bird rabbit lion tiger elephant mouse bear wolf sheep cow duck frog fish turtle monkey owl".split()
THING = "house car table book computer phone garden river mountain bridge window door letter picture chair clock train boat kitchen school office hospital museum library station airport market street city village forest island ocean lake song story machine robot voice model server sentence question answer".split()
VERB = "jumps over|runs past|looks at|walks around|sits near|hides behind|sleeps under|barks at|climbs over|waits for|finds|follows|remembers|talks about|points at|laughs at".split(
    "|"
)
OPEN = [
    "Hello",
    "Hi",
    "Hey",
    "Good morning",
    "Good evening",
    "Good afternoon",
    "Hello everyone",
    "Hi there",
    "Welcome",
    "Greetings",
    "Hello world",
]
FILL = ["uh", "um", "well", "you know", "so", "actually", "oh", "okay", "hmm"]
MISC = [
    "The {a} {b} {n} {v} the {a2} {n2}.",
    "Have you seen my {t}? I think I left it near the {t2}.",
    "I would like {f}, please.",
    "Could you please tell me where the {t} is?",
    "My name is {p}, and I live in {c}.",
    "Please call {p} at {tm}.",
    "It is {w} today in {c}.",
    "The weather in {c} will be {w} on {d}.",
    "We will meet on {d} at {tm}.",
    "The meeting is on {d}, {m} {o}.",
    "My birthday is on {m} {o}.",
    "I bought {k} {a} {t}s for {k2} dollars.",
    "There are {k} {n}s in the {t}.",
    "{p} has {k} {n}s and {p2} has {k2}.",
    "The answer is {k}.",
    "The train to {c} leaves at {tm}.",
    "It costs {k} dollars and {k2} cents.",
    "She was born in {y}.",
    "In {y}, we moved to {c}.",
    "I like {h}, but I do not like {h2}.",
    "And I like {f}. But I also have other interests such as {h}.",
    "Thank you very much, {p}. See you on {d}.",
    "I am sorry, I did not understand the question.",
    "Can you repeat that, please?",
    "Turn left at the {t}, and then walk for {k} minutes.",
    "What time is it? It is {tm}.",
    "Where are you going? I am going to {c}.",
    "How are you today, {p}? I am fine, thank you.",
    "I can not believe it, the {t} is {a}!",
    "Today is {d}, {m} {o}.",
    "One, two, three, four, five, six, seven, eight, nine, ten.",
    "Text to speech is the task of turning written text into spoken words.",
    "The {a} {t} was built in {y}.",
    "He said that the {t} is {a} and {a2}.",
    "Why is the {n} so {a}?",
    "Do you want {f} or {f2}?",
    "I have been {h} since {y}.",
    "Wow, that is a really {a} {t}!",
    "No, I do not want {f}.",
    "Yes, of course, I love {h}.",
    "This is a test of the {a} {t}.",
    "Let us talk about {h} for a moment.",
    "The number is {k}, not {k2}.",
    "My phone number is {dg}.",
    "The model runs on a graphics card and makes speech in real time.",
    "Artificial intelligence can speak with a {a} voice.",
    "The server answered {k} requests in {k2} seconds.",
    "Once upon a time, there was a {a} {n} who lived in a {a2} {t}.",
    "If it is {w} on {d}, we will stay at home.",
    "Peter Piper picked a peck of pickled peppers.",
    "She sells sea shells by the sea shore.",
    "How much wood would a woodchuck chuck, if a woodchuck could chuck wood?",
    "Please leave a message after the tone.",
    "Your call is important to us. Please hold the line.",
    "{p} and {p2} are {h} in {c}.",
    "I would like to order {f} and {f2}, please.",
    "The {n} {v} the {a} {t}, and then it {v2} the {n2}.",
    "You have {k} new messages.",
    "The password is {dg}.",
    "Flight {dg} to {c} is now boarding at gate {k}.",
]


def tm(r):
    h = r.randint(1, 12)
    return r.choice(
        [
            f"{num(h)} o'clock",
            f"half past {num(h)}",
            f"{num(h)} thirty",
            f"{num(h)} fifteen",
            f"{h}:{r.choice(['15', '30', '45', '10', '20'])}",
            f"{h} pm",
            f"{h} am",
            f"a quarter to {num(h)}",
        ]
    )


def num_any(r):
    n = r.choice([r.randint(0, 20), r.randint(0, 100), r.randint(0, 100), r.randint(100, 999), r.randint(1000, 9999)])
    return str(n) if r.random() < 0.35 and n < 1000 else num(n)


def fill_in(t, r):
    return t.format(
        a=r.choice(ADJ),
        a2=r.choice(ADJ),
        b=r.choice(ADJ),
        n=r.choice(ANIM),
        n2=r.choice(ANIM),
        v=r.choice(VERB),
        v2=r.choice(VERB),
        t=r.choice(THING),
        t2=r.choice(THING),
        f=r.choice(FOODS),
        f2=r.choice(FOODS),
        h=r.choice(HOBBY),
        h2=r.choice(HOBBY),
        p=r.choice(NAMES),
        p2=r.choice(NAMES),
        c=r.choice(CITY),
        d=r.choice(DAYS),
        m=r.choice(MONTHS),
        o=r.choice(ORD),
        w=r.choice(WEATHER),
        tm=tm(r),
        k=num_any(r),
        k2=num_any(r),
        y=r.choice([str(r.randint(1900, 2030)), str(r.randint(1700, 1999))]),
        dg=" ".join(num(r.randint(0, 9)) for _ in range(r.randint(3, 7))),
    )


def templates(r, n):
    out = set()
    tries = 0
    while len(out) < n and tries < 20 * n:
        tries += 1
        k = r.random()
        if k < 0.22:
            s = f"{r.choice(OPEN)}, my name is {r.choice(NAMES)}."
            j = r.random()
            if j < 0.5:
                s += f" And, {r.choice(FILL)}, I like {r.choice(FOODS)}."
            elif j < 0.8:
                s += f" And I like {r.choice(HOBBY)}."
            else:
                s += f" {r.choice(FILL).capitalize()}, I am from {r.choice(CITY)}."
        elif k < 0.3:
            s = f"{r.choice(FILL).capitalize()}, {fill_in(r.choice(MISC), r)}"
        else:
            s = fill_in(r.choice(MISC), r)
            if r.random() < 0.25:
                s += " " + fill_in(r.choice(MISC), r)
        if len(s) < 200:
            out.add(s)
    return sorted(out)


def words(r, n):
    w1 = [
        w.strip()
        for w in open(f"{DEB}/wamerican/usr/share/dict/american-english")
        if re.match(r"^[a-z]{2,14}$", w.strip())
    ]
    out = []
    for _ in range(n):
        k = r.randint(4, 9)
        ws = [r.choice(w1) for _ in range(k)]
        out.append(cap(", ".join(ws) if r.random() < 0.5 else " ".join(ws)))
    return out


HELD = [line for line in (HERE / "heldout.txt").read_text().splitlines() if line]

_h = _tok = None


def _init():
    global _h, _tok
    from hibari.tts import Hibari
    from transformers import AutoTokenizer

    _h = Hibari()
    _tok = AutoTokenizer.from_pretrained(HERE / "tokenizer")


def prep(text):
    """-> dict or None. span[i] = text-token index the i-th phoneme id belongs to (word-level, interpolated), -1 unknown"""
    try:
        ps = " ".join(_h.phonemize(text))
    except Exception as error:  # hibari does not say which; a text that it cannot read is named and left out
        print(f"left out: {text!r}: {error!r}", file=sys.stderr)
        return None
    ids = _h.ids(ps)
    e = _tok(text, add_special_tokens=False, return_offsets_mapping=True)
    tk, off = e["input_ids"], e["offset_mapping"]
    if not (5 <= len(ids) <= 300 and 3 <= len(tk) <= 250) or 1 in tk:
        return None
    span = [-1] * len(ids)
    ws = list(re.finditer(r"\S+", text))
    groups = ps.split(" ")
    if len(ws) == len(groups):
        k = 1
        for m, g in zip(ws, groups):
            t = [i for i, (a, b) in enumerate(off) if a >= m.start() and b <= m.end()]
            n = sum(c in _h.vocab for c in g)
            if not t or not n:
                return None
            for j in range(n):
                span[k + j] = t[min(len(t) - 1, int((j + 0.5) / n * len(t)))]
            k += n
            if k < len(ids) - 1:
                span[k] = t[-1]
                k += 1  # the space
        span[0] = 0
        span[-1] = len(tk) - 1
        if k != len(ids) - 1:
            span = [-1] * len(ids)
    return dict(text=text, tok=tk, ids=ids, span=span)


def main(scale=1.0):
    rng = random.Random(0)
    ex, defs = wordnet(rng)
    pr, bib = prose(rng), kjv(rng)
    print("wordnet examples", len(ex), "definitions", len(defs), "prose", len(pr), "kjv", len(bib))
    texts = []
    i = 0
    while i < len(ex):  # one to three examples per utterance
        k = rng.choice([1, 1, 2, 2, 3])
        j = ex[i : i + k]
        i += k
        s = " ".join(j)
        texts.append(s if len(s) < 190 else j[0])
    texts += defs[:14000]
    texts += pr[:14000]
    texts += bib[:7000]
    texts += templates(rng, 14000)
    texts += words(rng, 5000)
    low = {re.sub(r"\W+", " ", h.lower()).strip() for h in HELD}
    texts = [t for t in dict.fromkeys(texts) if not any(h in re.sub(r"\W+", " ", t.lower()) for h in low if len(h) > 8)]
    rng.shuffle(texts)
    texts = texts[: int(len(texts) * scale)]
    with Pool(2, _init) as p:
        data = [d for d in p.imap(prep, texts, 200) if d]
        heldd = [d for d in p.imap(prep, HELD) if d]
    print(
        len(texts),
        "texts,",
        len(data),
        "kept,",
        len(heldd),
        "held out; with spans:",
        sum(d["span"][0] >= 0 for d in data),
    )
    with gzip.open(os.path.join(WORK, "corpus.json.gz"), "wt") as f:
        json.dump(dict(train=data, held=heldd), f)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
