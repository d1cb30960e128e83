"""Train the codec: EnCodec's layout, so that Hugging Face's EncodecModel loads it.

    codec.py SHARDS OUT --t0 UNIX --gan S --freeze S --end S [--weights MODEL]

Encoder, quantiser and decoder train together until --freeze (with discriminators from --gan, if that is earlier); then the
corpus is turned into codes (OUT/tokens) and the decoder trains on alone, against the discriminators. They start from the
encoder and decoder in --weights; if that has the codebooks too, codes stay its own and only the decoder trains, or, with
--new-codes, all of them. Layers run as matrix products over [batch, time, channels]; tests of the equality with Hugging
Face's own forward: `codec.py --check`.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from steps import DEVICE, Average, Corpus, Run, adamw, add_group, autocast, captured, learn, save, set_rate, settings
from torch import nn
from transformers import EncodecConfig, EncodecModel
from transformers.models.encodec import modeling_encodec as hf

CONFIG = dict(
    target_bandwidths=[1.5, 3.0, 6.0], sampling_rate=24000, audio_channels=1, num_filters=16, hidden_size=128,
    codebook_dim=128, codebook_size=1024, upsampling_ratios=[8, 5, 4, 2], num_lstm_layers=2, use_causal_conv=True,
    norm_type="weight_norm", normalize=False, chunk_length_s=None, overlap=None,
)  # fmt: skip
FRAME, N_BOOKS, N_UNITS = 320, 8, 768
MEL_WINDOWS = {2048: 160, 1024: 80, 512: 40, 256: 20}  # samples: bands
QUIET = 0.01  # magnitude under which differences hardly count. With .1 consonants and all above 2 kHz came out 3 to 10 dB too low
SILENT, SPOKEN = 0.025, 0.1  # a frame's loudest band: below the first it counts a tenth, above the second in full
WAVE_WINDOWS = 2048, 512, 128
WEIGHTS = dict(sound=15.0, commit=0.5, expected=5.0)
HEARD, HEARD_FROM = 1.0, 1500  # the listener's share of the pull on the sound; how many steps it learns before
LISTENER_RATES = 1e-3, 1e-4
DEEP = 0.6  # share of the examples in the second voice, of which the codec loses more


# --- EnCodec's layers as matrix products ------------------------------------------------------------------------------


def reflected(x, n):
    """x [B, T, C] with n more samples before it, mirrored."""
    return torch.cat([x[:, 1 : n + 1].flip(1), x], 1) if n else x


def linear(x, weight, bias):
    """F.linear, in many short products where there are many rows: else the weight's gradient, a few numbers summed over
    a million rows, would be computed by a handful of the GPU's processors."""
    batch, n, width = x.shape
    if n < 600 or n % 8:
        return F.linear(x, weight, bias)
    if width % 8:  # the one channel's seven taps
        x, weight = (F.pad(y, (0, 8 - width % 8)) for y in (x, weight))
    rows = x.reshape(batch * 8, n // 8, -1)
    y = torch.bmm(rows, weight.t().expand(batch * 8, -1, -1)).view(batch, n, -1)
    return y if bias is None else y + bias


def convolve(layer, x):
    conv = layer.conv
    width, stride, dilation = conv.kernel_size[0], conv.stride[0], conv.dilation[0]
    weight = conv.weight.permute(0, 2, 1).flatten(1)  # [out, width * in]
    if stride > 1:  # width = 2 * stride
        blocks = reflected(x, width - stride).unflatten(1, (-1, stride)).flatten(2)
        return linear(torch.cat([blocks[:, :-1], blocks[:, 1:]], -1), weight, conv.bias)
    if width == 1:
        return linear(x, weight, conv.bias)
    n, padded = x.shape[1], reflected(x, (width - 1) * dilation)
    taps = torch.cat([padded[:, i * dilation : i * dilation + n] for i in range(width)], -1)
    return linear(taps, weight, conv.bias)


def convolve_transposed(layer, x):
    conv, weight = layer.conv, layer.conv.weight  # [in, out, width], width = 2 * stride
    stride, n_out = conv.stride[0], weight.shape[1]
    both = linear(x, weight.permute(2, 1, 0).flatten(0, 1), None)
    now, later = both.unflatten(-1, (2, stride * n_out)).unbind(2)
    y = now + F.pad(later[:, :-1], (0, 0, 1, 0))
    return y.unflatten(-1, (stride, n_out)).flatten(1, 2) + conv.bias


def through(layer, x):
    if isinstance(layer, hf.EncodecConv1d):
        return convolve(layer, x)
    if isinstance(layer, hf.EncodecConvTranspose1d):
        return convolve_transposed(layer, x)
    if isinstance(layer, hf.EncodecResnetBlock):
        y = x
        for part in layer.block:
            y = through(part, y)
        return convolve(layer.shortcut, x) + y
    if isinstance(layer, hf.EncodecLSTM):
        with torch.autocast(DEVICE, enabled=False):
            y = x.float().transpose(0, 1).contiguous()
            return (layer.lstm(y)[0] + y).transpose(0, 1)
    return F.elu(x)


def encode(model, wav):
    """wav [B, samples] (whole frames) -> latents [B, frames, 128]"""
    x = wav[..., None]
    for layer in model.encoder.layers:
        x = through(layer, x)
    return x.float()


def decode(model, latents):
    x = latents
    for layer in model.decoder.layers:
        x = through(layer, x)
    return x[..., 0].float()


def build():
    model = EncodecModel(EncodecConfig(**CONFIG))
    with torch.no_grad():
        for m in model.modules():  # unit gain, no bias: Hugging Face's own start trains far slower here
            if isinstance(m, nn.Conv1d | nn.ConvTranspose1d):
                norm, direction = m.parametrizations.weight.original0, m.parametrizations.weight.original1
                n_in, width = (m.in_channels, m.kernel_size[0])
                fan = n_in * width if isinstance(m, nn.Conv1d) else n_in * width / m.stride[0]
                direction.normal_(std=fan**-0.5)
                norm.copy_(direction.flatten(1).norm(dim=1).view_as(norm))
                m.bias.zero_()
    return model


# --- Residual vector quantiser ----------------------------------------------------------------------------------------


def nearest(x, embed):
    return (x @ embed.t() * 2 - embed.pow(2).sum(1)).argmax(1)


class Expected(nn.Module):
    """What units and voice let one expect of the latents: [B, T] frames' units and voices -> [B, T, 128]."""

    def __init__(self, width=256):
        super().__init__()
        self.unit, self.voice = nn.Embedding(N_UNITS, width), nn.Embedding(2, width)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 128)

    def forward(self, unit, voice):
        x = (self.unit(unit) + self.voice(voice)).transpose(1, 2)
        for conv in self.convs:
            x = x + F.gelu(conv(x))
        return self.out(self.norm(x.transpose(1, 2))).float()


class Quantiser:
    """Codebooks that follow the moving mean of what falls to them, over EncodecModel's buffers. The first codebook's
    code is the nearest to what units and voice let one expect, not to the latent itself: so the coarse model can know it
    from its units alone, whatever it said before. The other codebooks hold what is left of the latent."""

    def __init__(self, model):
        self.books = [layer.codebook for layer in model.quantizer.layers]
        self.decay = [0.95] + [0.99] * (len(self.books) - 1)  # the first follows a network that learns

    @torch.no_grad()
    def start(self, latents, expected, rows_per_step):
        true, rest = latents.flatten(0, 1), expected.flatten(0, 1)
        for i, book in enumerate(self.books):
            size = book.codebook_size
            embed = rest[torch.randint(0, len(rest), (size,), device=rest.device)].clone()
            for _ in range(12):
                chosen = nearest(rest, embed)
                n, total = self._counts(chosen, rest, size)
                spare = rest[torch.randint(0, len(rest), (size,), device=rest.device)]
                embed = torch.where(n[:, None] > 0, total / n.clamp(min=1)[:, None], spare)
            n = n.clamp(min=1) * (rows_per_step / len(rest))
            book.embed.copy_(embed), book.cluster_size.copy_(n), book.embed_avg.copy_(embed * n[:, None])
            rest = (rest if i else true) - embed[nearest(rest, embed)]

    @staticmethod
    def _counts(chosen, rows, size):
        n = torch.zeros(size, device=rows.device).index_add_(0, chosen, torch.ones_like(chosen, dtype=torch.float))
        return n, torch.zeros(size, rows.shape[1], device=rows.device).index_add_(0, chosen, rows)

    @torch.no_grad()
    def _follow(self, book, decay, chosen, rows):
        n, total = self._counts(chosen, rows, book.codebook_size)
        book.cluster_size.lerp_(n, 1 - decay)
        book.embed_avg.lerp_(total, 1 - decay)
        size = book.cluster_size.sum()
        smooth = (book.cluster_size + 1e-5) / (size + book.codebook_size * 1e-5) * size
        dead = (book.cluster_size < 0.1)[:, None]
        spare = rows[torch.randint(0, len(rows), (book.codebook_size,), device=rows.device)]
        book.embed.copy_(torch.where(dead, spare, book.embed_avg / smooth[:, None]))
        book.embed_avg.copy_(torch.where(dead, spare, book.embed_avg))
        book.cluster_size.copy_(torch.where(dead[:, 0], torch.ones_like(smooth), book.cluster_size))

    def train(self, latents, expected):
        """-> quantised, with straight-through gradients; commitment loss; which rows hold more than codebook 1. A twelfth
        of the rows keep only that, half what coarse says, codebooks 1 and 2: what one of fine's frames says does not
        know of its neighbours, so that all that must fit together has to be in these."""
        batch = len(latents)
        keep, how = torch.randint(2, N_BOOKS, (batch,), device=latents.device), torch.rand(batch, device=latents.device)
        keep = torch.where(how < 0.65, keep, N_BOOKS)
        keep = torch.where(how < 0.08, 1, torch.where(how < 0.6, 2, keep))
        rest, out, commit = latents, 0.0, 0.0
        for i, book in enumerate(self.books):
            rows = (rest if i else expected).detach().flatten(0, 1)
            chosen = nearest(rows, book.embed)
            part = F.embedding(chosen, book.embed).view_as(rest)
            kept = (i < keep).float()[:, None, None]
            commit = commit + ((rest - part).pow(2) * kept).mean()
            out, rest = out + part * kept, rest - part
            self._follow(book, self.decay[i], chosen, rows)
        source = torch.where((keep == 1)[:, None, None], expected, latents)
        return source + (out - source).detach(), commit, keep > 1

    @torch.no_grad()
    def codes(self, latents, expected):
        """[B, T, 128] twice -> [8, B, T]; expected = latents: EncodecModel's own codes"""
        rest, out = latents, []
        for i, book in enumerate(self.books):
            chosen = nearest((rest if i else expected).flatten(0, 1), book.embed)
            out.append(chosen.view(latents.shape[:2]))
            rest = rest - F.embedding(out[-1], book.embed)
        return torch.stack(out)

    @torch.no_grad()
    def latents(self, codes, keep):
        """codes [8, B, T], keep [B] codebooks -> [B, T, 128]"""
        out = 0.0
        for i, book in enumerate(self.books):
            out = out + F.embedding(codes[i], book.embed) * (i < keep).float()[:, None, None]
        return out


# --- Losses -----------------------------------------------------------------------------------------------------------


def mel_matrix(n_fft, n_bands):
    hertz = np.linspace(0, 12000, n_fft // 2 + 1)
    top = 2595 * np.log10(1 + 12000 / 700)
    edge = 700 * (10 ** (np.linspace(0, top, n_bands + 2) / 2595) - 1)
    up = (hertz - edge[:-2, None]) / (edge[1:-1] - edge[:-2])[:, None]
    down = (edge[2:, None] - hertz) / (edge[2:] - edge[1:-1])[:, None]
    return torch.tensor(np.maximum(0, np.minimum(up, down)), dtype=torch.float32, device=DEVICE)


class LogMel:
    def __init__(self, n_fft, hop, n_bands):
        self.n_fft, self.hop = n_fft, hop
        self.window, self.matrix = torch.hann_window(n_fft, device=DEVICE), mel_matrix(n_fft, n_bands)

    def __call__(self, x):
        spectrum = torch.stft(x, self.n_fft, self.hop, window=self.window, return_complex=True)
        magnitude = torch.view_as_real(spectrum).pow(2).sum(-1).add(1e-9).sqrt()
        return torch.log10(self.matrix @ magnitude + QUIET)

    def loss(self, y, x):
        """Mean distance, frames where x is silent counting little: they would hold most of the gradient."""
        mine, true = self(y), self(x)
        loudest, low, high = true.amax(1, keepdim=True), math.log10(SILENT + QUIET), math.log10(SPOKEN + QUIET)
        return ((mine - true).abs() * ((loudest - low) / (high - low)).clamp(0.1, 1.0)).mean()


class WaveLoss:
    """Complex spectra compared, relative to how loud the speech is: it teaches harmonics and their phase. Of the sound's
    differences y[t] - .9 y[t - 1], so that high harmonics count beside the far louder low ones."""

    def __init__(self):
        self.windows = [torch.hann_window(n, device=DEVICE) for n in WAVE_WINDOWS]

    def __call__(self, y, x, rows=None):
        y, x = (a[:, 1:] - 0.9 * a[:, :-1] for a in (y, x))
        total, kept = 0.0, 1.0 if rows is None else rows[:, None, None, None].float()
        for window in self.windows:
            n = len(window)
            mine, true = (
                torch.view_as_real(torch.stft(a, n, n // 4, window=window, return_complex=True)) for a in (y, x)
            )
            total = total + ((mine - true).abs() * kept).mean() / true.abs().mean().clamp(min=1e-4)
        return total


class SpectralDiscriminator(nn.Module):
    def __init__(self, n_fft, channels=32):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.n_fft, self.window = n_fft, nn.Buffer(torch.hann_window(n_fft), persistent=False)
        self.convs = nn.ModuleList([norm(nn.Conv2d(2, channels, (3, 9), (1, 2), (1, 4)))])
        for d in (1, 2, 4):
            self.convs.append(norm(nn.Conv2d(channels, channels, (3, 9), (1, 2), (d, 4), (d, 1))))
        self.convs.append(norm(nn.Conv2d(channels, channels, (3, 3), padding=1)))
        self.last = norm(nn.Conv2d(channels, 1, (3, 3), padding=1))

    def forward(self, x):
        with torch.autocast(DEVICE, enabled=False):
            s = torch.stft(x, self.n_fft, self.n_fft // 4, window=self.window, normalized=True, return_complex=True)
            s = torch.view_as_real(s).permute(0, 3, 2, 1)
        return judge(self, s)


class PeriodDiscriminator(nn.Module):
    def __init__(self, period, channels=(16, 64, 128, 256)):
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.period = period
        pairs = zip((1, *channels), channels, strict=False)
        self.convs = nn.ModuleList(norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in pairs)
        self.convs.append(norm(nn.Conv2d(channels[-1], channels[-1], (5, 1), padding=(2, 0))))
        self.last = norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, x):
        n = x.shape[1] // self.period * self.period
        return judge(self, x[:, :n].reshape(len(x), 1, -1, self.period))


def judge(discriminator, x):
    """-> verdict, the layers' features"""
    x, features = x.contiguous(memory_format=torch.channels_last), []
    for conv in discriminator.convs:
        x = F.leaky_relu(conv(x), 0.1)
        features.append(x)
    return discriminator.last(x).float(), features


class Discriminators(nn.Module):
    def __init__(self):
        super().__init__()
        spectral = [SpectralDiscriminator(n) for n in (2048, 1024, 512, 256)]
        self.all = nn.ModuleList(spectral + [PeriodDiscriminator(p) for p in (2, 3, 5, 7, 11)])

    def forward(self, x):
        return [d(x) for d in self.all]


class Listener(nn.Module):
    """Says which unit sounds in every frame: sound [B, samples] -> log probabilities [B, frames, units]. It learns from the
    teacher's speech alone; that it hears the same in the decoded sound is one of the losses."""

    def __init__(self, width=192, n_bands=80):
        super().__init__()
        self.mel = LogMel(1024, FRAME, n_bands)
        self.first = nn.Conv1d(n_bands, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(4))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, N_UNITS)

    def forward(self, wav):
        x = self.mel(wav)[..., :-1] + 1
        with autocast():
            x = F.gelu(self.first(x))
            for conv in self.convs:
                x = x + F.gelu(conv(x))
            x = self.out(self.norm(x.transpose(1, 2)))
        return F.log_softmax(x.float(), -1)


# --- Training ---------------------------------------------------------------------------------------------------------


class Trainer:
    def __init__(self, corpus, options):
        self.corpus, self.batch, self.frames = corpus, options.batch, options.frames
        self.model = build().to(DEVICE)
        self.quantiser = Quantiser(self.model)
        self.judges = Discriminators().to(DEVICE).to(memory_format=torch.channels_last)
        self.expected = Expected().to(DEVICE)
        self.listener, self.n_listened = Listener().to(DEVICE), torch.zeros((), device=DEVICE)
        self.mels = [LogMel(n, n // 4, bands) for n, bands in MEL_WINDOWS.items()]
        self.wave_loss = WaveLoss()
        self.share = {k: torch.zeros((), device=DEVICE) for k in ("wave", "judged", "heard")}  # of the pull on the sound, mel: 1
        self.sound = [*self.model.encoder.parameters(), *self.model.decoder.parameters(), *self.expected.parameters()]
        self.decoder = list(self.model.decoder.parameters())
        self.optimizer = adamw([*self.model.encoder.parameters(), *self.decoder], 5e-4, (0.8, 0.99), 1e-3)
        add_group(self.optimizer, self.expected.parameters(), times=2)
        self.judge_optimizer = adamw(self.judges.parameters(), 4e-4, (0.8, 0.99), 1e-3)
        self.listener_optimizer = adamw(self.listener.parameters(), 1e-3, (0.9, 0.99), 1e-3)
        self.average = Average(self.decoder)
        self.codes = self.spoken = self.n_spoken = None

    def crop(self, limit):
        """Frame numbers [B, frames] of random crops within the first `limit` frames; DEEP of them in the second voice."""
        first, second = ((torch.rand(self.batch, device=DEVICE) * (limit - self.frames)).long() for _ in range(2))
        again = (self.corpus.voice[first] == 0) & (torch.rand(self.batch, device=DEVICE) < 4 * DEEP - 2)
        start = torch.where(again, second, first)
        return start[:, None] + torch.arange(self.frames, device=DEVICE)

    def wave(self, frames):
        return self.corpus.wav[frames].flatten(1).float() / 32768

    def expect(self, frames):
        return self.expected(self.corpus.unit[frames].long(), self.corpus.voice[frames].long())

    def spectral_loss(self, y, x):
        return sum(mel.loss(y, x) for mel in self.mels)

    def verdicts(self, y, x):
        """-> the judges' loss, and what the generator pays them: verdicts and features."""
        with autocast():
            real, fake = self.judges(x), self.judges(y)
        loss = sum((1 - r).pow(2).mean() + f.pow(2).mean() for (r, _), (f, _) in zip(real, fake, strict=True))
        verdict = sum((1 - f).pow(2).mean() for f, _ in fake)
        pairs = [
            (a, b.detach()) for (_, fa), (_, fb) in zip(fake, real, strict=True) for a, b in zip(fa, fb, strict=True)
        ]
        return loss, verdict, sum(F.l1_loss(a.float(), b.float()) for a, b in pairs)

    def listen(self, y, x, unit):
        """-> the listener's own loss, and how much less it hears in y than in x: nats a frame. Both are heard through the
        same noise, of which no row has more than a whisper."""
        noise = torch.randn_like(x) * torch.rand(len(x), 1, device=DEVICE) * 0.004
        true, mine = self.listener(x + noise), self.listener(y + noise)
        heard = F.kl_div(mine, true.detach(), log_target=True, reduction="none").sum(-1).mean()
        return F.nll_loss(true.flatten(0, 1), unit.flatten()), heard

    def pull(self, y, x, unit, gan, phased=None):
        """-> a loss whose gradient at the sound y is the sum of mel's, wave's (of the rows `phased`), the listener's and the
        judges', each brought to mel's size times its share (left as they are, waveform L1 is 12,000 times smaller than mel);
        metrics. The listener and the judges learn."""
        leaf = y.detach().requires_grad_()
        losses = dict(mel=self.spectral_loss(leaf, x), wave=self.wave_loss(leaf, x, phased))
        listened, losses["heard"] = self.listen(leaf, x, unit)
        self.n_listened += 1
        self.share["heard"].copy_(HEARD * (self.n_listened / HEARD_FROM - 1).clamp(0, 1))
        metrics = dict(losses, listener=listened)
        if gan:
            judged, verdict, features = self.verdicts(leaf, x)
            losses["judged"] = verdict + 2 * features
            metrics |= dict(judges=judged, verdict=verdict, features=features)
        pulls = {
            k: torch.autograd.grad(loss, leaf, retain_graph=k == "judged")[0].nan_to_num(0.0, 0.0, 0.0)
            for k, loss in losses.items()
        }
        learn(listened, list(self.listener.parameters()), self.listener_optimizer, 5.0)
        if gan:
            learn(judged, list(self.judges.parameters()), self.judge_optimizer, 10.0)
        size = pulls["mel"].norm()
        total = pulls["mel"]
        for k in pulls.keys() & self.share.keys():
            total = total + pulls[k] * (self.share[k] * size / pulls[k].norm().clamp(min=1e-12))
        return WEIGHTS["sound"] * (y * total).sum(), metrics

    def step(self, quantise, gan):
        """Encoder, quantiser and decoder together."""
        w = WEIGHTS
        frames = self.crop(self.corpus.n_frames)
        x = self.wave(frames)
        with autocast():
            z, expected = encode(self.model, x), self.expect(frames)
        if quantise:
            q, commit, phased = self.quantiser.train(z, expected)
        else:
            phased = torch.rand(len(z), device=DEVICE) > 0.2
            q, commit = torch.where(phased[:, None, None], z, expected), (z - expected.detach()).pow(2).mean()
        with autocast():
            y = decode(self.model, q)
        sound, metrics = self.pull(y, x, self.corpus.unit[frames].long(), gan, phased)
        surprise = (expected - z.detach()).pow(2).mean()
        metrics |= dict(commit=commit, surprise=surprise / z.detach().flatten(0, 1).var(0).mean())
        learn(sound + w["commit"] * commit + w["expected"] * surprise, self.sound, self.optimizer, 20.0)
        return {k: v.detach() for k, v in metrics.items()}

    def decoder_step(self):
        """The decoder alone, on the corpus's codes; where there are some, 60% of the rows on fine's own codes. A fifth of
        the rows hold what coarse says alone."""
        imitated = (torch.rand(self.batch, device=DEVICE) < 0.6) & (self.n_spoken > self.frames + 1)
        limit = torch.where(imitated, self.n_spoken, self.corpus.n_frames)
        frames = self.crop(limit)
        codes = torch.where(imitated[:, None], self.spoken[:, frames], self.codes[:, frames]).long()
        keep = torch.where(torch.rand(self.batch, device=DEVICE) < 0.2, 2, N_BOOKS)
        x = self.wave(frames)
        with autocast():
            y = decode(self.model, self.quantiser.latents(codes, keep))
        loss, metrics = self.pull(y, x, self.corpus.unit[frames].long(), True)
        learn(loss, self.decoder, self.decoder_optimizer, 20.0)
        self.average.update()
        return {k: v.detach() for k, v in metrics.items()}

    def state(self, averaged):
        codec = {k: v.clone() for k, v in self.model.state_dict().items()}
        if averaged:
            names = [n for n, _ in self.model.decoder.named_parameters()]
            codec |= {f"decoder.{n}": p.clone() for n, p in zip(names, self.average.mean, strict=True)}
        return dict(
            codec=codec,
            raw=self.model.state_dict(),
            judges=self.judges.state_dict(),
            expected=self.expected.state_dict(),
        )


def settle(run, trainer, step, optimizers, until, rates, tag, shares, averaged=False):
    """Steps until a time; learning rates fall along a cosine. shares: of the waveform loss, of the judges, and for how
    many steps these only learn (their share then rises for as many, and falls to nothing at the end)."""
    wave, judged, wait = shares
    trainer.share["wave"].fill_(wave), trainer.share["judged"].fill_(0.0)
    began, n = run.now(), 0
    every, sync, metrics = (200, 20, {}) if DEVICE == "cuda" else (20, 1, {})
    for optimizer in optimizers:
        set_rate(optimizer, 1e-5)  # capture takes a few steps
    replay = captured(step, optimizers, run)
    while run.now() < until:
        share = min(1.0, (run.now() - began) / max(1.0, until - began))
        rise = min(1.0, (n + 1) / 200)
        for optimizer, (high, low) in zip(optimizers, rates, strict=True):
            set_rate(optimizer, rise * (low + (high - low) * 0.5 * (1 + np.cos(np.pi * share))))
        if judged:
            trainer.share["judged"].fill_(judged * min(1.0, max(0.0, n / wait - 1)) * (1 - share))
        metrics = replay()
        n += 1
        if n == 300 and averaged:
            trainer.average.reset()
        if n % sync == 0:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            yield n
        if n % every == 0:
            run.log(event=tag, step=n, **{k: float(v) for k, v in metrics.items()})
        if run.save_due():
            save(run.out / "codec.pt", trainer.state(averaged))
    run.log(event=f"{tag} over", step=n, **{k: float(v) for k, v in metrics.items()})
    save(run.out / "codec.pt", trainer.state(averaged))


def start_from(trainer, path):
    """Weights made before: the encoder and the decoder; with codebooks, all that there is. -> were there codebooks?"""
    state = {k.removeprefix("codec_model."): v for k, v in load_file(path).items() if k.startswith("codec_model.")}
    whole = any(k.startswith("quantizer") for k in state)
    missing, unknown = trainer.model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    missing = [k for k in missing if not k.startswith("quantizer")]
    assert not unknown and (not missing or not state), (missing[:5], unknown[:5])
    expected = {k.removeprefix("expected."): v.float() for k, v in load_file(path).items() if k.startswith("expected.")}
    if expected:
        trainer.expected.load_state_dict(expected)
    if whole:  # what only training needs lies beside it
        more = torch.load(Path(path).with_name("training.pt"), map_location=DEVICE, weights_only=True)
        trainer.judges.load_state_dict(more["judges"]), trainer.expected.load_state_dict(more["expected"])
    return whole


def wait_for_corpus(run, corpus, until):
    while not corpus.complete and run.now() < until:
        time.sleep(0.5)
    corpus.grow()
    run.log(event="corpus", hours=corpus.n / 75 / 3600)


def train_all_parts(run, trainer, options):
    corpus = trainer.corpus
    while corpus.grow() < 75 * 60 * options.minimum_minutes and not corpus.complete:
        time.sleep(0.5)
    run.log(event="first audio", hours=corpus.n / 75 / 3600)

    def go(quantise, gan, until, rates, tag):
        optimizers = [trainer.optimizer, trainer.listener_optimizer, *([trainer.judge_optimizer] if gan else [])]
        rates = [rates[0], LISTENER_RATES, *rates[1:]]
        step, shares = lambda: trainer.step(quantise, gan), (1.0, 1.0 if gan else 0.0, 300)
        for n in settle(run, trainer, step, optimizers, until, rates, tag, shares):
            if n % 60 == 0:
                corpus.grow()

    if (run.out / "codec.pt").exists():  # a crash before: not from the start
        state = torch.load(run.out / "codec.pt", map_location="cpu", weights_only=True)
        trainer.model.load_state_dict(state["raw"])
        trainer.judges.load_state_dict(state["judges"]), trainer.expected.load_state_dict(state["expected"])
    if not trainer.model.quantizer.layers[0].codebook.embed.any():
        go(False, False, run.now() + options.warm, [(5e-4, 5e-4)], "autoencoder")
        with torch.no_grad(), autocast():
            some = [trainer.crop(corpus.n_frames) for _ in range(8)]
            latents = torch.cat([encode(trainer.model, trainer.wave(frames)) for frames in some])
            expected = torch.cat([trainer.expect(frames) for frames in some])
            trainer.quantiser.start(latents, expected, trainer.batch * trainer.frames)
    go(True, False, options.gan, [(5e-4, 1e-4 if options.gan == options.freeze else 4e-4)], "codec")
    if options.gan < options.freeze:
        go(True, True, options.freeze, [(4e-4, 2e-4), (4e-4, 3e-4)], "codec, adversarial")
    corpus.grow()
    run.log(event="frozen", hours=corpus.n / 75 / 3600)


@torch.no_grad()
def tokenise(run, trainer, seconds_a_batch):
    """The corpus's codes [8, frames], utterance by utterance from a silent start, as presets are made."""
    torch.backends.cudnn.benchmark = False
    meta = np.concatenate(trainer.corpus.meta)
    size, start = meta[:, 1], np.concatenate([[0], np.cumsum(meta[:, 1])])
    codes = torch.zeros(N_BOOKS, len(trainer.corpus.wav), dtype=torch.int16, device=DEVICE)
    order, i = np.argsort(size), 0
    while i < len(order):
        n = max(1, int(seconds_a_batch * 75 / size[order[min(i + 255, len(order) - 1)]]))
        rows = order[i : i + min(n, 256)]
        i += len(rows)
        longest = int(size[rows].max())
        at = torch.as_tensor(start[rows], device=DEVICE)[:, None] + torch.arange(longest, device=DEVICE)
        real = torch.arange(longest, device=DEVICE) < torch.as_tensor(size[rows], device=DEVICE)[:, None]
        at = at.clamp(max=trainer.corpus.n - 1)
        wav = (trainer.corpus.wav[at].float() / 32768 * real[..., None]).flatten(1)
        last = torch.as_tensor(start[rows] + size[rows] - 1, device=DEVICE)[:, None]
        expected = trainer.expect(torch.minimum(at, last))
        codes[:, at[real]] = trainer.quantiser.codes(encode(trainer.model, wav), expected)[:, real].short()
    torch.backends.cudnn.benchmark = True
    used = [len(torch.unique(row)) for row in codes[:, : trainer.corpus.n]]
    folder = run.out / ".tokens"
    folder.mkdir(exist_ok=True)
    np.save(folder / "codes.npy", codes[:, : trainer.corpus.n].cpu().numpy())
    np.save(folder / "sem.npy", np.concatenate(trainer.corpus.sem))
    np.save(folder / "meta.npy", meta)
    (folder / "shards.txt").write_text("\n".join(trainer.corpus.files))
    save(run.out / "codec_frozen.pt", trainer.state(False))
    folder.rename(run.out / "tokens")
    run.log(event="tokens", hours=trainer.corpus.n / 75 / 3600, utterances=len(meta), codes_used=str(used))
    return codes


def train_decoder(run, trainer, codes):
    trainer.codes, trainer.spoken = codes, codes.clone()
    trainer.n_spoken = torch.zeros((), device=DEVICE)
    trainer.decoder_optimizer = adamw(trainer.decoder, 2e-4, (0.8, 0.99), 1e-3)
    trainer.optimizer = None
    trainer.average.reset()
    optimizers = [trainer.decoder_optimizer, trainer.listener_optimizer, trainer.judge_optimizer]
    imitation = run.out / "imitation.npy"  # fine's own codes of the corpus's first frames (gpt.py)
    rates, shares = [(3e-4, 2e-5), LISTENER_RATES, (3e-4, 5e-5)], (0.5, 2.0, 200)
    loop = settle(run, trainer, trainer.decoder_step, optimizers, run.end, rates, "decoder", shares, True)
    for n in loop:
        if n % (100 if DEVICE == "cuda" else 1) == 0 and imitation.exists() and not float(trainer.n_spoken):
            spoken = torch.from_numpy(np.load(imitation)).to(DEVICE)
            trainer.spoken[:, : spoken.shape[1]] = spoken
            trainer.n_spoken.fill_(float(spoken.shape[1]))
            run.log(event="decoder hears fine's own codes", hours=spoken.shape[1] / 75 / 3600)


def resume(run, trainer):
    """After a crash: the last checkpoint, the same corpus, the same codes."""
    state = torch.load(run.out / "codec.pt", map_location="cpu", weights_only=True)
    frozen = torch.load(run.out / "codec_frozen.pt", map_location="cpu", weights_only=True)
    decoder = {k: v for k, v in state["raw"].items() if k.startswith("decoder")}
    trainer.model.load_state_dict(frozen["raw"] | decoder)
    trainer.judges.load_state_dict(state["judges"]), trainer.expected.load_state_dict(frozen["expected"])
    trainer.corpus.grow((run.out / "tokens" / "shards.txt").read_text().split())
    codes = torch.zeros(N_BOOKS, len(trainer.corpus.wav), dtype=torch.int16, device=DEVICE)
    codes[:, : trainer.corpus.n] = torch.from_numpy(np.load(run.out / "tokens" / "codes.npy")).to(DEVICE)
    return codes


def check():
    """Our forward against Hugging Face's."""
    torch.manual_seed(0)
    model, wav = build(), torch.randn(2, FRAME * 40) * 0.1
    with torch.no_grad():
        ours, theirs = encode(model, wav), model.encoder(wav[:, None]).transpose(1, 2)
        assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
        ours, theirs = decode(model, theirs), model.decoder(theirs.transpose(1, 2))[:, 0]
        assert torch.allclose(ours, theirs, atol=1e-4), (ours - theirs).abs().max()
        quantiser, z = Quantiser(model), torch.randn(2, 40, 128)
        quantiser.start(*[torch.randn(4, 600, 128)] * 2, 2400)
        codes = quantiser.codes(z, z)
        all_books = torch.full((2,), N_BOOKS)
        theirs = model.quantizer.decode(model.quantizer.encode(z.transpose(1, 2), 6.0)).transpose(1, 2)
        assert torch.allclose(quantiser.latents(codes, all_books), theirs, atol=1e-4)  # two codes may be one vector
    print("as Hugging Face's")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shards"), parser.add_argument("out")
    for name in ("t0", "gan", "freeze", "end"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--weights", help="safetensors to start from: codec_model.*")
    parser.add_argument("--new-codes", action="store_true", help="codebooks in --weights are where they start")
    parser.add_argument("--warm", type=float, default=25.0, help="seconds without codes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--frames", type=int, default=75)
    parser.add_argument("--hours", type=float, default=62.0)
    parser.add_argument("--minimum-minutes", type=float, default=40.0)
    options = parser.parse_args()
    settings()
    torch.manual_seed(0)
    run = Run("codec", options.out, options.t0, options.end)
    trainer = Trainer(Corpus(options.shards, options.hours), options)
    if (run.out / "tokens").exists():
        codes = resume(run, trainer)
    else:
        if options.weights and start_from(trainer, options.weights) and not options.new_codes:
            wait_for_corpus(run, trainer.corpus, options.freeze)
        else:
            train_all_parts(run, trainer, options)
        codes = tokenise(run, trainer, 1200 if DEVICE == "cuda" else 60)
    train_decoder(run, trainer, codes)


if __name__ == "__main__":
    import sys

    check() if sys.argv[1:] == ["--check"] else main()
