"""Train the three GPTs on Bark's own input layouts; parameter names are Hugging Face's.

    gpt.py semantic|coarse|fine OUT --t0 UNIX --end S [--weights MODEL] [--corpus CORPUS_JSON]

Every batch is drawn on the device, inside the captured step: no loader. `gpt.py --check` compares the windows with
what Hugging Face's generate feeds the coarse model.
"""

import argparse
import gzip
import json
import math
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steps import DEVICE, PLAIN, Average, Run, adamw, autocast, captured, learn, save, set_rate, settings
from torch import nn

N_UNITS, N_TEXT = 768, 94  # semantic units; character pieces of the tokenizer
SEM_PAD = N_UNITS  # also the end token
TEXT_OFFSET = N_UNITS + 1
TEXT_PAD, SEM_INFER = TEXT_OFFSET + N_TEXT, TEXT_OFFSET + N_TEXT + 1
FULL_STOP = TEXT_OFFSET + 41
SEM_IN, SEM_OUT = (SEM_INFER + 1 + 63) // 64 * 64, (N_UNITS + 1 + 63) // 64 * 64
COARSE_PAD, COARSE_INFER = N_UNITS + 2048, N_UNITS + 2049
COARSE_IN, COARSE_OUT = (N_UNITS + 2050 + 63) // 64 * 64, N_UNITS + 2048
TOKENS_PER_UNIT = 75 / 49.9 * 2
WINDOW_UNITS, UNITS_BEFORE, PAST, NEW = 256, 209, 630, 60
SLOTS = PAST + NEW  # coarse tokens of a window
FINE_IN, FINE_PAD, FINE_WINDOW, FINE_PAST = 1056, 1024, 1024, 512
SHORT_CONTEXT, SHORT_WINDOWS = 128, (158, 218)  # what streaming fills: chunks of 24 and 84 frames with 6 after them
COARSE_SHARPNESS = 1.4  # checkpoints have coarse's logits times this: said at Bark's .7 they are sampled at .5, see README.md
SHAPES = dict(semantic=(8, 5, 320), coarse=(8, 4, 256), fine=(5, 4, 256))  # layers, heads, width


# --- The model --------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width, n_heads, causal):
        super().__init__()
        self.n_heads, self.causal = n_heads, causal
        self.att_proj, self.out_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)

    def forward(self, x):
        batch, n, width = x.shape
        q, k, v = self.att_proj(x).view(batch, n, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(y.transpose(1, 2).reshape(batch, n, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        return self.out_proj(F.gelu(self.in_proj(x)))


class Block(nn.Module):
    def __init__(self, width, n_heads, causal):
        super().__init__()
        self.layernorm_1, self.layernorm_2 = (nn.LayerNorm(width, bias=not causal) for _ in range(2))
        self.attn, self.mlp = Attention(width, n_heads, causal), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.layernorm_1(x))
        return x + self.mlp(self.layernorm_2(x))


class GPT(nn.Module):
    def __init__(self, kind):
        super().__init__()
        n_layers, n_heads, width = SHAPES[kind]
        if kind == "fine":
            self.input_embeds_layers = nn.ModuleList(nn.Embedding(FINE_IN, width) for _ in range(8))
        else:
            n_in, n_out = (SEM_IN, SEM_OUT) if kind == "semantic" else (COARSE_IN, COARSE_OUT)
            self.input_embeds_layer, self.lm_head = nn.Embedding(n_in, width), nn.Linear(width, n_out, bias=False)
        self.position_embeds_layer = nn.Embedding(1024, width)
        self.layers = nn.ModuleList(Block(width, n_heads, kind != "fine") for _ in range(n_layers))
        self.layernorm_final = nn.LayerNorm(width, bias=kind == "fine")
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * n_layers) if "out_proj" in name else 0.02)

    def forward(self, x, tap=None):
        """embeddings [B, T, C] -> final hidden states, and layer `tap`'s"""
        x = x + self.position_embeds_layer.weight[: x.shape[1]]
        middle = None
        for i, block in enumerate(self.layers):
            x = block(x)
            middle = x if i == tap else middle
        return self.layernorm_final(x), middle


@torch.no_grad()
def start_aligned(model):
    """Positions start as sinusoids of time, shared by units and coarse tokens (unit slot s sounds at coarse slot
    3.006 s), and in the first two layers the heads start out looking at units of the same time, a little before it
    and after it. So a coarse token finds its unit from the first step on."""
    n_layers, n_heads, width = SHAPES["coarse"]
    size = width // n_heads  # 62 dimensions for 31 frequencies, one that tells units from coarse tokens, one constant
    period = torch.exp(torch.linspace(math.log(9.0), math.log(2000.0), size // 2 - 1))  # coarse tokens
    frequency = 2 * math.pi / period

    def wave(at):
        angle = at[:, None] * frequency
        return torch.cat([angle.cos(), angle.sin(), torch.zeros(len(at), 1), torch.ones(len(at), 1)], 1)

    position = model.position_embeds_layer.weight
    position[:, :size] = 0
    position[:WINDOW_UNITS, :size] = 0.12 * wave((torch.arange(WINDOW_UNITS) + 0.5) * TOKENS_PER_UNIT)
    slots = torch.arange(WINDOW_UNITS, 1024)
    position[WINDOW_UNITS:, :size] = 0.12 * wave(slots - WINDOW_UNITS + 0.0)  # slot 256 + j predicts token j
    position[:WINDOW_UNITS, size - 2], position[WINDOW_UNITS:, size - 2] = 0.12, -0.12
    model.input_embeds_layer.weight[:, :size] *= 0.1  # these dimensions belong to time at first
    for layer in model.layers[:2]:
        qkv = layer.attn.att_proj.weight.view(3, n_heads, size, width)
        for head, shift in zip(range(3), (0.0, 5.0, -5.0), strict=True):  # tokens ahead
            qkv[:2, head] *= 0.2
            c, s = (frequency * shift).cos().diag(), (frequency * shift).sin().diag()
            turn = torch.cat([torch.cat([c, -s], 1), torch.cat([s, c], 1)], 0)
            qkv[0, head, : size - 2, : size - 2] += turn
            qkv[1, head, : size - 2, : size - 2] += torch.eye(size - 2)
            qkv[0, head, size - 1, size - 1] += 2.0  # the constant asks,
            qkv[1, head, size - 1, size - 2] += 2.0  # units answer
        qkv[2, :3] *= 2.5
        layer.attn.out_proj.weight *= 2.5


def weights(model):
    """Parameters by Hugging Face's names, whether or not the blocks are compiled."""
    return {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}


# --- Tokens -----------------------------------------------------------------------------------------------------------


class Tokens:
    """The corpus on the device: units [n], codes [8, frames] (flat), and where each utterance starts."""

    def __init__(self, folder):
        meta = np.load(folder / "meta.npy")
        order = np.argsort(meta[:, 0], kind="stable")  # one voice after the other
        put = lambda x: torch.as_tensor(x, device=DEVICE)  # noqa: E731
        self.n_frames, self.n_units = put(meta[:, 1]), put(meta[:, 2])
        self.frame_start = put(np.concatenate([[0], np.cumsum(meta[:, 1])[:-1]]))
        self.unit_start = put(np.concatenate([[0], np.cumsum(meta[:, 2])[:-1]]))
        self.voice, self.order = put(meta[:, 0]), put(order)
        self.of_voice = put(np.bincount(meta[:, 0], minlength=2))
        self.codes = put(np.load(folder / "codes.npy").astype(np.int16))
        self.sem = put(np.load(folder / "sem.npy").astype(np.int16))
        self.cumulative = self.n_frames[self.order].cumsum(0).double()
        first = self.cumulative[self.of_voice[0] - 1]
        self.begin = torch.stack([torch.zeros_like(first), first, self.cumulative[-1]])  # of each voice, in frames

    def pick(self, n):
        """Utterances, the longer the likelier; the two voices in turn."""
        voice = torch.arange(n, device=DEVICE) % 2
        share = torch.rand(n, device=DEVICE, dtype=torch.double)
        at = self.begin[voice] + share * (self.begin[voice + 1] - self.begin[voice])
        return self.order[torch.searchsorted(self.cumulative, at, right=True).clamp(max=len(self.order) - 1)]

    def pick_of(self, voice):
        n = self.of_voice[voice]
        rank = (torch.rand(len(voice), device=DEVICE, dtype=torch.double) * n).long().clamp(max=n - 1)
        return self.order[rank + voice * self.of_voice[0]]


def uniform(n):
    return torch.rand(n, device=DEVICE)


# --- Semantic ---------------------------------------------------------------------------------------------------------


class Semantic:
    """Text plus a preset's last units -> units, end. Utterances come as the teacher says them; most of the batches hold
    only shorter ones. A training-only head in the middle layer says which text token is being spoken."""

    tap, lengths = 3, (320, 704)  # units

    def __init__(self, batch, folder=None, corpus=None):
        self.rows = batch, max(1, batch * 3 // 8)
        self.model = GPT("semantic").to(DEVICE)
        self.head = nn.Linear(SHAPES["semantic"][2], 256).to(DEVICE)
        self.params = [*self.model.parameters(), *self.head.parameters()]
        self.shapes = [(rows, 257 + n - 1, True) for rows, n in zip(self.rows, self.lengths, strict=True)]
        self.losses, self.turns = [lambda: self.loss(0), lambda: self.loss(1)], (0, 0, 0, 1)
        self.folder, self.files = folder, set()
        if corpus:
            with gzip.open(corpus, "rt") as file:
                texts = json.load(file)["train"]
            self._allocate(texts)

    def _allocate(self, texts):
        zeros = lambda *shape: torch.zeros(shape, dtype=torch.long, device=DEVICE)  # noqa: E731
        rows = np.full((len(texts), 256), TEXT_PAD, np.int64)
        for row, text in zip(rows, texts, strict=True):
            row[: len(text["tok"])] = np.array(text["tok"][:256]) + TEXT_OFFSET
        self.texts, self.spans = torch.as_tensor(rows, device=DEVICE), [np.array(t["span"]) for t in texts]
        self.unit, self.spoken = (torch.zeros(16_000_000, dtype=torch.int16, device=DEVICE) for _ in range(2))
        self.start, self.n, self.voice, self.text = (zeros(len(texts)) for _ in range(4))
        self.short_enough, self.n_short_enough = zeros(2, len(texts)), zeros(2)  # for each of the lengths
        self.of_voice, self.n_of_voice = zeros(2, len(texts)), zeros(2)
        self.n_units = self.n_texts = 0

    def grow(self):
        for file in sorted(self.folder.glob("s*.npz")):
            if file.name not in self.files:
                with np.load(file) as z:
                    self._add(z["sem"], z["phone"], z["meta"])
                self.files.add(file.name)
        return self.n_texts

    def _add(self, unit, phone, meta):
        voice, _, n, text = meta.T
        start = np.concatenate([[0], np.cumsum(n)])
        spoken = [self.spans[t][phone[a : a + k]] for t, a, k in zip(text, start, n, strict=False)]
        put = lambda x: torch.as_tensor(np.asarray(x, np.int64), device=DEVICE)  # noqa: E731
        place = slice(self.n_units, self.n_units + len(unit))
        self.unit[place], self.spoken[place] = put(unit).short(), put(np.concatenate(spoken)).short()
        place = slice(self.n_texts, self.n_texts + len(n))
        self.start[place], self.n[place] = put(start[:-1] + self.n_units), put(n)
        self.voice[place], self.text[place] = put(voice), put(text)
        number = np.arange(len(n)) + self.n_texts
        fits = [n < self.lengths[0], (n >= self.lengths[0]) & (n < self.lengths[1])]
        for i in (0, 1):
            self._append(self.short_enough[i], self.n_short_enough[i], put(number[fits[i]]))
            self._append(self.of_voice[i], self.n_of_voice[i], put(number[voice == i]))
        self.n_units, self.n_texts = self.n_units + len(unit), self.n_texts + len(n)

    @staticmethod
    def _append(these, n, more):
        these[int(n) : int(n) + len(more)] = more
        n += len(more)

    def draw(self, which):
        """-> text [B, 256], preset's units [B, 256], units [B, L] (padded), targets [B, L], text token spoken [B, L]"""
        rows, length = self.rows[which], self.lengths[which]
        said = self.short_enough[which, (uniform(rows) * self.n_short_enough[which]).long()]
        voice = self.voice[said]
        before = self.of_voice[voice, (uniform(rows) * self.n_of_voice[voice]).long()]
        slot, n = torch.arange(length, device=DEVICE), self.n[said, None]
        at = (self.start[said, None] + slot).clamp(max=len(self.unit) - 1)
        units = torch.where(slot < n, self.unit[at].long(), SEM_PAD)
        targets = torch.where(slot <= n, units, -100)  # the first padding is the end
        spoken = torch.where(slot < n, self.spoken[at].long(), -100)
        slot, kept = torch.arange(256, device=DEVICE), self.n[before, None].clamp(max=256)
        preset = self.unit[
            (self.start[before, None] + self.n[before, None] - kept + slot).clamp(max=len(self.unit) - 1)
        ]
        given = (slot < kept) & (uniform(rows)[:, None] < 0.7)
        return self.unstopped(self.texts[self.text[said]]), torch.where(given, preset.long(), SEM_PAD), units, targets, spoken

    @staticmethod
    def unstopped(text):
        """One in five texts loses its full stop: users leave it away."""
        last = (text != TEXT_PAD).sum(1, keepdim=True) - 1
        lost = (text.gather(1, last) == FULL_STOP) & (uniform(len(text))[:, None] < 0.2)
        return text.scatter(1, last, torch.where(lost, TEXT_PAD, text.gather(1, last)))

    def loss(self, which):
        text, preset, units, targets, spoken = self.draw(which)
        wrong = torch.rand(units.shape, device=DEVICE) < 0.15 * uniform(len(units))[:, None]
        units = torch.where(wrong, torch.randint(0, N_UNITS, units.shape, device=DEVICE), units)
        embed = self.model.input_embeds_layer
        infer = torch.full_like(text[:, :1], SEM_INFER)
        x = torch.cat([embed(text) + embed(preset), embed(torch.cat([infer, units[:, :-1]], 1))], 1)
        final, middle = self.model(x, self.tap)
        logits = self.model.lm_head(final[:, 256:]).float()
        unit = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        where = F.cross_entropy(
            self.head(middle[:, 256:]).float().flatten(0, 1),
            spoken.where(spoken >= 0, -100).flatten(),
            ignore_index=-100,
        )
        return unit + 0.2 * where, dict(unit=unit, where=where)


# --- Coarse -----------------------------------------------------------------------------------------------------------


class Coarse:
    """Windows as BarkCoarseModel.generate cuts them. Slot j of a window's 690 holds coarse token `first + j` of
    [history | utterance]; the last 60 of them, at most, are what inference would ask for."""

    aligned, tap = (-2, 0, 2), 3  # units that the middle layer must know, relative to the sounding one

    def __init__(self, batch):
        self.batch, self.length = batch, WINDOW_UNITS + SLOTS
        guessed = int(batch * 0.5) - int(batch * 0.15)  # rows, see corrupted()
        self.shapes = [(batch, self.length, True), (guessed, self.length, False)]
        self.losses, self.turns = [self.loss], (0,)
        self.model = GPT("coarse")
        start_aligned(self.model)
        width = SHAPES["coarse"][2]
        self.model.to(DEVICE)
        sounding = (torch.arange(0, SLOTS, 2) / TOKENS_PER_UNIT).long()
        self.which = (sounding + torch.tensor(self.aligned)[:, None]).clamp(0, WINDOW_UNITS - 1).to(DEVICE)
        self.unit_heads = nn.Linear(width, len(self.aligned) * (N_UNITS + 1)).to(DEVICE)
        self.params = [*self.model.parameters(), *self.unit_heads.parameters()]

    def draw(self):
        """-> units [B, 256] (padded), codes [B, 690] in 0..1023, which of them are real [B, 690]"""
        t, n = self.tokens, self.batch
        said = t.pick(n)
        before = t.pick_of(t.voice[said])
        n_tokens = 2 * torch.minimum(t.n_frames[said], (t.n_units[said] * (TOKENS_PER_UNIT / 2)).long())
        step = (uniform(n) * ((n_tokens + NEW - 1) // NEW)).long() * NEW
        # The voice preset: mostly all of it, sometimes a part, sometimes none.
        how = uniform(n)
        most = torch.minimum(t.n_units[before] // 2 * 2, (2 * t.n_frames[before] / TOKENS_PER_UNIT).long()).clamp(
            max=UNITS_BEFORE
        )
        part = (uniform(n) * most / 2).long() * 2
        units_before = torch.where(how < 0.75, most, torch.where(how < 0.88, part, 0))
        tokens_before = ((units_before * TOKENS_PER_UNIT).round().long() // 2 * 2 - 2).clamp(min=0)
        return self.windows(said, before, units_before, tokens_before, n_tokens, step)

    def windows(self, said, before, units_before, tokens_before, n_tokens, step):
        t = self.tokens
        now = units_before + (step / TOKENS_PER_UNIT).round().long()
        unit = (now - UNITS_BEFORE).clamp(min=0)[:, None] + torch.arange(WINDOW_UNITS, device=DEVICE)
        own = unit - units_before[:, None]
        at = torch.where(
            own < 0, t.unit_start[before, None] + t.n_units[before, None] + own, t.unit_start[said, None] + own
        )
        units = t.sem[at.clamp(0, len(t.sem) - 1)].long()
        units = torch.where(own < t.n_units[said, None], units, COARSE_PAD)
        past = (tokens_before + step).clamp(max=PAST)
        token = (tokens_before + step - past)[:, None] + torch.arange(SLOTS, device=DEVICE)
        own = token - tokens_before[:, None]
        frame, book = own.div(2, rounding_mode="floor"), own % 2
        # The preset's last frame is dropped: its token -1 is that of the frame before the last.
        history = t.frame_start[before, None] + t.n_frames[before, None] - 1 + frame
        at = torch.where(own < 0, history, t.frame_start[said, None] + frame)
        codes = t.codes[book, at.clamp(0, t.codes.shape[1] - 1)].long()
        in_window = torch.arange(SLOTS, device=DEVICE) < (past + NEW)[:, None]
        return units, codes, in_window & (own < n_tokens[:, None])

    def hidden(self, units, codes, tap=None):
        """hidden states [B, 690, C] that say token j, from units and the tokens before j"""
        offset = torch.arange(SLOTS, device=DEVICE) % 2 * 1024 + N_UNITS
        infer = torch.full_like(units[:, :1], COARSE_INFER)
        ids = torch.cat([units, infer, (codes + offset)[:, :-1]], 1)
        final, middle = self.model(self.model.input_embeds_layer(ids), tap)
        return final[:, WINDOW_UNITS:], middle[:, WINDOW_UNITS:] if tap is not None else None

    def logits(self, hidden):
        """[2, B, 345, 1024]: codebook 0 at even slots, codebook 1 at odd ones"""
        head = self.model.lm_head.weight[N_UNITS:].unflatten(0, (2, 1024))
        return torch.stack([F.linear(hidden[:, book::2], head[book]) for book in (0, 1)])

    def corrupted(self, units, codes):
        """What inference may find behind it in place of the true codes. By row: true; the model's own guesses, made
        from its own guesses; random tokens; another utterance's past, of the same voice; nothing but noise up to some point."""
        n = len(codes)
        own, random, other, noise = (int(n * share) for share in (0.15, 0.5, 0.7, 0.9))  # each kind's first row
        rate, token = uniform(n)[:, None], torch.rand(codes.shape, device=DEVICE)
        noisy = torch.randint(0, 1024, codes.shape, device=DEVICE)
        blank = torch.arange(SLOTS, device=DEVICE) < rate * 1.2 * SLOTS
        given = codes.clone()
        rows = slice(own, random)
        for _ in range(2):
            guess = self.guessed(units[rows], given[rows])
            given[rows] = torch.where(token[rows] < 1.5 * rate[rows], guess, codes[rows])
        given[random:other] = torch.where(token < rate, noisy, codes)[random:other]
        given[other:noise] = torch.where(blank, codes.roll(2, 0), codes)[other:noise]  # rows take turns in voice
        given[noise:] = torch.where(blank, noisy, codes)[noise:]
        return given

    @torch.no_grad()
    def guessed(self, units, codes, temperature=0.85):
        logits = self.logits(self.hidden(units, codes)[0]).float() / temperature
        noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
        return (logits + noise).argmax(-1).permute(1, 2, 0).flatten(1)

    def loss(self):
        units, codes, real = self.draw()
        given = self.corrupted(units, codes)
        final, middle = self.hidden(units, given, self.tap)
        logits = self.logits(final).flatten(0, 2)
        targets, kept = (x.unflatten(1, (-1, 2)).permute(2, 0, 1) for x in (codes, real))
        each = F.cross_entropy(logits.float(), targets.flatten(), reduction="none").view_as(targets) * kept
        n = kept.sum((1, 2)).clamp(min=1)
        first, second = (each.sum((1, 2)) / n).unbind(0)
        aligned = self.alignment(middle[:, ::2], units, real[:, ::2])
        return first + second + 0.25 * aligned, dict(first=first, second=second, aligned=aligned)

    def alignment(self, middle, units, real):
        """Even slots' middle states -> the unit of that moment and its neighbours."""
        targets = units[:, self.which].clamp(max=N_UNITS).permute(0, 2, 1)  # [B, 345, 3]; padding is one more unit
        logits = self.unit_heads(middle).unflatten(-1, (len(self.aligned), N_UNITS + 1)).float()
        each = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="none").view_as(targets)
        return (each * real[..., None]).sum() / (real.sum() * len(self.aligned)).clamp(min=1)


# --- Fine -------------------------------------------------------------------------------------------------------------


class Fine:
    """Windows of 1,024 frames: up to 512 of a preset, then speech, then padding. Each sixth of a batch predicts one
    codebook; from that codebook on, frames after the known ones are hidden. Every other batch is of short windows as
    streaming asks for them: SHORT_CONTEXT known frames, then speech up to the window's end."""

    def __init__(self, batch):
        self.each = max(1, batch // 6)
        self.batch = 6 * self.each
        self.shapes = [(self.batch, FINE_WINDOW, True), *((self.batch, n, True) for n in SHORT_WINDOWS)]
        self.losses = [partial(self.loss, self.draw), *(partial(self.loss, partial(self.draw_short, n)) for n in SHORT_WINDOWS)]
        self.turns = (0, 1, 0, 2)
        self.model = GPT("fine").to(DEVICE)
        self.params = list(self.model.parameters())

    def draw(self):
        """-> codes [8, B, 1024] (padded), which frames are known, which are to be predicted"""
        t, n = self.tokens, self.batch
        said = t.pick(n)
        before = t.pick_of(t.voice[said])
        n_before = torch.where(uniform(n) < 0.85, t.n_frames[before].clamp(max=FINE_PAST), 0)
        # Mostly one utterance and padding, as at inference; else another one after it, now and then of another voice.
        other = torch.where(uniform(n) < 0.8, t.voice[said], (uniform(n) < 0.5).long())
        after = t.pick_of(other)
        n_real = n_before + t.n_frames[said] + torch.where(uniform(n) < 0.5, 0, t.n_frames[after])
        known = torch.where(uniform(n) < 0.2, n_before + (uniform(n) * 512).long(), n_before).clamp(max=FINE_WINDOW - 1)
        frame = torch.arange(FINE_WINDOW, device=DEVICE)
        own = frame - n_before[:, None]
        history = t.frame_start[before, None] + t.n_frames[before, None] + own
        later = t.frame_start[after, None] + own - t.n_frames[said, None]
        at = torch.where(own < t.n_frames[said, None], t.frame_start[said, None] + own, later)
        at = torch.where(own < 0, history, at).clamp(0, t.codes.shape[1] - 1)
        real = frame < n_real[:, None]
        codes = torch.where(real, t.codes[:, at].long(), FINE_PAD)
        return codes, frame < known[:, None], real

    def draw_short(self, length):
        """-> as draw, for windows of `length` frames from anywhere in an utterance; before it, a preset"""
        t, n = self.tokens, self.batch
        said = t.pick(n)
        before = t.pick_of(t.voice[said])
        frame = torch.arange(length, device=DEVICE)
        first = (uniform(n) * t.n_frames[said]).long() * (uniform(n) < 0.7)  # of the chunk; often the utterance's own
        own = frame + (first - SHORT_CONTEXT)[:, None]
        history = t.frame_start[before, None] + t.n_frames[before, None] + own
        at = torch.where(own < 0, history, t.frame_start[said, None] + own).clamp(0, t.codes.shape[1] - 1)
        real = own < t.n_frames[said, None]
        codes = torch.where(real, t.codes[:, at].long(), FINE_PAD)
        return codes, (frame < SHORT_CONTEXT).expand(n, -1), real

    def hidden(self, codes, known):
        """Rows [each * i, each * (i + 1)) see codebooks 0 to i + 2, the last of them only where known."""
        tables, parts = self.model.input_embeds_layers, []
        for i in range(6):
            rows, book = slice(self.each * i, self.each * (i + 1)), i + 2
            hidden = torch.where(known[rows], codes[book, rows], FINE_PAD)
            parts.append(sum(tables[k](codes[k, rows]) for k in range(book)) + tables[book](hidden))
        return self.model(torch.cat(parts))[0]

    def loss(self, draw):
        codes, known, real = draw()
        hidden, losses = self.hidden(codes, known), []
        for i in range(6):
            rows, book = slice(self.each * i, self.each * (i + 1)), i + 2
            logits = F.linear(hidden[rows], self.model.input_embeds_layers[book].weight[:1024]).float()
            target = codes[book, rows]
            each = F.cross_entropy(logits.flatten(0, 1), target.clamp(max=1023).flatten(), reduction="none")
            weight = (real[rows] & ~known[rows]).flatten().float()
            losses.append((each * weight).sum() / weight.sum().clamp(min=1))
        total = torch.stack(losses)
        return total.mean(), dict(loss=total.mean(), third=total[0], eighth=total[5])

    @torch.no_grad()
    def imitate(self, n_frames, temperature=0.5, rows=32):
        """Our own codebooks 2 to 7 over the corpus's first frames, codebooks 0 and 1 being true: [8, n_frames].
        Windows hop by 512: the first half of each is known, and already ours."""
        tables, t = self.model.input_embeds_layers, self.tokens
        lane = n_frames // rows // 512 * 512  # each row walks its own stretch
        at = torch.arange(rows, device=DEVICE)[:, None] * lane + torch.arange(lane, device=DEVICE)
        codes = t.codes[:, at].long()
        for first in range(0, lane - 512, 512):
            window = codes[:, :, first : first + FINE_WINDOW].clone()
            for book in range(2, 8):
                window[book, :, 512:] = FINE_PAD
                x = sum(tables[k](window[k]) for k in range(book + 1))
                with autocast():
                    hidden = self.model(x)[0][:, 512:]
                logits = F.linear(hidden, tables[book].weight[:1024]).float() / temperature
                noise = -torch.log(-torch.log(torch.rand_like(logits).clamp(1e-9, 1 - 1e-7)))
                window[book, :, 512:] = (logits + noise).argmax(-1)
            codes[2:, :, first + 512 : first + FINE_WINDOW] = window[2:, :, 512:]
        out = t.codes[:, : rows * lane].clone()
        out[:, at.flatten()] = codes.flatten(1).short()
        return out


# --- Training ---------------------------------------------------------------------------------------------------------


def compile_blocks(task, run):
    """Fuse what is inside a block. Compiled before the tokens come; plain blocks if the compiler fails."""
    if DEVICE == "cpu" or PLAIN:
        return False
    torch._dynamo.config.cache_size_limit = 64
    try:
        for block in task.model.layers:
            block.compile(dynamic=False)
        for rows, n, learns in task.shapes:
            x = torch.randn(rows, n, SHAPES[run.name][2], device=DEVICE, requires_grad=True)
            for _ in range(2):
                with autocast(), torch.set_grad_enabled(learns):
                    final = task.model(x * 1.0)[0].sum()
                if learns:
                    final.backward()
    except Exception as error:
        run.log(event="no compiled blocks", error=repr(error)[:300])
        for block in task.model.layers:
            block._compiled_call_impl = None
        return False
    finally:
        task.model.zero_grad(set_to_none=True)
    run.log(event="blocks compiled")
    return True


def start_from(model, path, prefix):
    state = {k.removeprefix(prefix): v.float() for k, v in load_file(path).items() if k.startswith(prefix)}
    if "coarse" in prefix and state:  # the first two nano-barks have no such factor; dividing by it does a start no harm
        state["lm_head.weight"] /= COARSE_SHARPNESS
    if state:
        model.load_state_dict({k: v for k, v in state.items() if not k.startswith("lm_heads")})


def wait_for(path, run):
    while not path.exists():
        time.sleep(0.3)
        if run.left() < 0:
            raise SystemExit("no tokens in time")


def train(run, task, options, compiled):
    average = Average(task.model.parameters())
    optimizer = adamw(task.params, options.rate, (0.9, 0.98), 0.05)

    def step(loss_of):
        with autocast():
            loss, metrics = loss_of()
        learn(loss, task.params, optimizer, 1.0)
        average.update()
        return {k: v.detach() for k, v in metrics.items()}

    def state():
        mean = dict(zip(weights(task.model), average.mean, strict=True))
        return dict(model={k: v.half().cpu() for k, v in mean.items()}, raw=task.model.state_dict(), step=n)

    set_rate(optimizer, 1e-5)
    replays = [captured(partial(step, loss_of), [optimizer], run, compiled) for loss_of in task.losses]
    began, n, metrics, every = run.now(), 0, {}, 250 if DEVICE == "cuda" else 2
    while run.left() > 0:
        share = min(1.0, (run.now() - began) / max(1.0, run.end - began))
        set_rate(optimizer, options.rate * min(1, (n + 1) / 300) * max(0.02, 0.5 * (1 + math.cos(math.pi * share))))
        metrics = replays[task.turns[n % len(task.turns)]]()
        n += 1
        if n % 200 == 0 and hasattr(task, "grow"):
            task.grow()
        if n == 500:
            average.reset()
        if n % 20 == 0 and DEVICE == "cuda":
            torch.cuda.synchronize()
        if n % every == 0:
            run.log(step=n, **{k: float(v) for k, v in metrics.items()})
        if run.save_due():
            save(run.out / f"{run.name}.pt", state())
    save(run.out / f"{run.name}.pt", state())
    run.log(event="over", step=n, **{k: float(v) for k, v in metrics.items()})
    torch._foreach_copy_([p.data for p in task.model.parameters()], average.mean)


def imitation(run, task, hours):
    """Code a part of the corpus as inference will, for the decoder to learn from."""
    began = run.now()
    n_frames = min(task.tokens.codes.shape[1], int(hours * 3600 * 75))
    rows = 64 if n_frames > 64 * 2048 else 2
    codes = task.imitate(n_frames, rows=rows).cpu().numpy()
    with (run.out / ".imitation.npy").open("wb") as file:
        np.save(file, codes)
    (run.out / ".imitation.npy").rename(run.out / "imitation.npy")
    run.log(event="imitation", hours=codes.shape[1] / 75 / 3600, took=run.now() - began)


def fed_windows(model, config, units, prompt, true):
    """What Hugging Face's coarse model feeds itself, window by window, while it says `true`: ids, and how many are new."""
    from types import SimpleNamespace

    from transformers import GenerationMixin

    semantic, given = (SimpleNamespace(**config[k]) for k in ("semantic_config", "coarse_acoustics_config"))
    fed = []

    def say_the_truth(self, ids, max_new_tokens, **more):
        new = true[sum(n for _, n in fed) :][:max_new_tokens]
        fed.append((ids[0], len(new)))
        return torch.cat([ids, new[None]], 1)

    generate, GenerationMixin.generate = GenerationMixin.generate, say_the_truth
    try:
        model.generate(
            units, history_prompt=prompt, semantic_generation_config=semantic, coarse_generation_config=given
        )
    finally:
        GenerationMixin.generate = generate
    return fed


def check():
    """Our coarse windows against what BarkCoarseModel.generate feeds itself, for presets of several lengths. (Of presets
    under 4.2 s some get an odd number of history tokens; training leaves that case out.)"""
    from assemble import generation
    from transformers import BarkCoarseConfig, BarkCoarseModel

    rng = np.random.default_rng(0)
    n_units = np.array([300, 265, 120, 180, 410])
    n_frames = (n_units * TOKENS_PER_UNIT / 2).astype(int)
    coarse = Coarse(1)
    t = coarse.tokens = Tokens.__new__(Tokens)
    t.n_units, t.n_frames = torch.tensor(n_units), torch.tensor(n_frames)
    t.unit_start, t.frame_start = (torch.tensor(np.concatenate([[0], np.cumsum(n)[:-1]])) for n in (n_units, n_frames))
    t.sem = torch.tensor(rng.integers(0, N_UNITS, n_units.sum()))
    t.codes = torch.tensor(rng.integers(0, 1024, (8, n_frames.sum())))
    sizes = dict(num_layers=1, num_heads=1, hidden_size=8, input_vocab_size=COARSE_IN, output_vocab_size=COARSE_OUT)
    theirs, config = BarkCoarseModel(BarkCoarseConfig(**sizes)), generation()
    for before, said in ((0, 1), (1, 4), (3, 2), (None, 4)):
        units = slice(t.unit_start[said], t.unit_start[said] + n_units[said])
        frames = slice(t.frame_start[said], t.frame_start[said] + n_frames[said])
        true = (t.codes[:2, frames] + torch.tensor([[0], [1024]]) + N_UNITS).t().flatten()
        prompt = None
        if before is not None:
            a, b = t.unit_start[before], t.frame_start[before]
            prompt = dict(
                semantic_prompt=t.sem[a : a + n_units[before]], coarse_prompt=t.codes[:2, b : b + n_frames[before]]
            )
        most = (
            0
            if prompt is None
            else min(UNITS_BEFORE, n_units[before] // 2 * 2, int(2 * n_frames[before] / TOKENS_PER_UNIT))
        )
        past = max(0, round(most * TOKENS_PER_UNIT) // 2 * 2 - 2)
        for i, (ids, n_new) in enumerate(fed_windows(theirs, config, t.sem[None, units].clone(), prompt, true)):
            one = lambda x: torch.tensor([x])  # noqa: E731
            row = coarse.windows(
                one(said), one(before or 0), one(most), one(past), one(2 * n_frames[said]), one(60 * i)
            )
            n, (units_of, codes, real) = len(ids) - WINDOW_UNITS - 1, (x[0] for x in row)
            tokens = codes + torch.arange(SLOTS) % 2 * 1024 + N_UNITS
            assert (units_of == ids[:WINDOW_UNITS]).all(), (before, said, i)
            assert (tokens[:n] == ids[WINDOW_UNITS + 1 :]).all(), (before, said, i)
            assert real.sum() == n + n_new and (tokens[n : n + n_new] == true[60 * i :][:n_new]).all()
    print("as Hugging Face's")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("semantic", "coarse", "fine")), parser.add_argument("out")
    for name in ("t0", "end"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--weights", help="safetensors to start from, if they have this model")
    parser.add_argument("--corpus", help="for semantic: the texts")
    parser.add_argument("--minimum-texts", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=1.2e-3)
    parser.add_argument("--imitate-hours", type=float, default=20.0, help="of the corpus, coded by fine at its end")
    options = parser.parse_args()
    settings()
    torch.manual_seed(1)
    run = Run(options.kind, options.out, options.t0, options.end)
    semantic = options.kind == "semantic"
    if semantic:
        task = Semantic(options.batch, run.out / "shards", options.corpus)
    else:
        task = dict(coarse=Coarse, fine=Fine)[options.kind](options.batch)
    if options.weights:
        start_from(task.model, options.weights, "semantic." if semantic else f"{options.kind}_acoustics.")
    checkpoint = run.out / f"{run.name}.pt"
    if checkpoint.exists():  # a crash before
        task.model.load_state_dict(torch.load(checkpoint, map_location=DEVICE, weights_only=True)["raw"])
    compiled = compile_blocks(task, run)
    if semantic:
        while task.grow() < options.minimum_texts:
            time.sleep(1)
    else:
        wait_for(run.out / "tokens", run)
        task.tokens = Tokens(run.out / "tokens")
    train(run, task, options, compiled)
    if options.kind == "fine":
        imitation(run, task, options.imitate_hours)


if __name__ == "__main__":
    check() if sys.argv[1:] == ["--check"] else main()
