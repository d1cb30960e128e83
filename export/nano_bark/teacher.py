# ruff: noqa: B905, E731
"""Teacher speech from hibari-tts (Apache-2.0): audio, phone alignment and per-frame features.

The hibari ONNX graph is re-exported with its duration tensor as an extra output, so every 12.5 ms frame
carries its phoneme. Two voices: 0 = hibari "heart"; 1 = the same network with F0 and formants lowered in the
source-filter synthesis ("deep").
"""

from pathlib import Path

import numpy as np

UNITS = Path(__file__).with_name("units.npz")
FPS, SR = 80, 24000  # the teacher's frames, samples
SEM_HZ = 49.9
LEAD_S = 0.06  # silence before the first sound
DURATIONS = "/Clip_output_0"  # a tensor inside hibari's graph
VOICES = ["heart", "deep"]


def export(path):
    """hibari's graph with its durations as one more output."""
    import hibari
    import onnx

    model = onnx.load(Path(hibari.__file__).parent / "assets" / "hibari.onnx")
    model.graph.output.append(onnx.helper.make_tensor_value_info(DURATIONS, onnx.TensorProto.FLOAT, None))
    onnx.save(model, str(path))


def mel_fb(n_bins=601, n_mel=40, sr=SR, fmin=60.0, fmax=10000.0):
    mel = lambda f: 2595 * np.log10(1 + f / 700)
    inv = lambda m: 700 * (10 ** (m / 2595) - 1)
    pts = inv(np.linspace(mel(fmin), mel(fmax), n_mel + 2))
    f = np.linspace(0, sr / 2, n_bins)
    fb = np.maximum(
        0,
        np.minimum(
            (f[None] - pts[:-2, None]) / (pts[1:-1] - pts[:-2])[:, None],
            (pts[2:, None] - f[None]) / (pts[2:] - pts[1:-1])[:, None],
        ),
    )
    return (fb / np.maximum(fb.sum(1, keepdims=True), 1e-6)).astype(np.float32)


FB = mel_fb()
N_CEP = 13
DCT = np.cos(np.pi / 40 * (np.arange(40)[None] + 0.5) * np.arange(N_CEP)[:, None]).astype(np.float32) * np.sqrt(2 / 40)


def smooth(x, w):
    k = np.hanning(w + 2)[1:-1]
    k /= k.sum()
    p = w // 2
    xp = np.pad(x, ((p, p), (0, 0)), mode="edge")
    return sum(k[i] * xp[i : i + len(x)] for i in range(w)).astype(np.float32)


class Teacher:
    def __init__(self, path):
        import onnxruntime as ort

        so = ort.SessionOptions()
        so.intra_op_num_threads = so.inter_op_num_threads = 1
        so.log_severity_level = 3
        self.s = ort.InferenceSession(str(path), so, providers=["CPUExecutionProvider"])

    def __call__(self, ids, voice=0, seed=0):
        """-> wav float32, phone position per 80 Hz frame, features [F, N_CEP + 2]."""
        from hibari import dsp

        o = self.s.run(None, {"ids": np.asarray([ids], np.int64), "speed": np.ones(1, np.float32)})
        lh, th, ln, lr, phi, f0 = (x[0] for x in o[:6])
        dur = o[6].reshape(-1).astype(np.int64) * 2  # the graph counts them in frames of 25 ms
        pos = np.repeat(np.arange(len(dur)), dur)
        F = lh.shape[1]
        assert len(pos) == F, (len(pos), F)
        # features are taken before the voice change, so the units do not depend on the voice
        p = dsp.ex(2 * lh) * (f0 > 40) + dsp.ex(2 * ln) + dsp.ex(2 * lr)
        cep = np.log(p.T @ FB.T + 1e-5) @ DCT.T
        lf = np.log(np.where(f0 > 60, f0, np.nan))
        if np.isfinite(lf).any():
            i = np.arange(F)
            ok = np.isfinite(lf)
            lf = np.interp(i, i[ok], lf[ok])
        else:
            lf = np.full(F, 5.2)
        feats = np.concatenate([smooth(cep, 5), smooth(lf[:, None], 5), (f0 > 60).astype(np.float32)[:, None]], 1)
        if voice == 1:
            n = lh.shape[0]
            src = np.minimum(np.arange(n) / 0.87, n - 1)
            a = src.astype(np.int64)
            b = np.minimum(a + 1, n - 1)
            w = (src - a).astype(np.float32)[:, None]
            lh, th, ln, lr = (x[a] * (1 - w) + x[b] * w for x in (lh, th, ln, lr))
            phi, th = phi[a], th * 0  # the voice-1 harmonics keep the pulse phase (DNSMOS 3.07 against 2.92)
            f0 = f0 * np.float32(0.62)
            lh = lh - 0.35
        wav = dsp.synth(
            np.ascontiguousarray(lh), np.ascontiguousarray(th), ln, lr, phi, f0, np.random.default_rng(seed)
        )
        # Speech begins LEAD_S after the start: a listener of a stream waits for every frame of silence before it.
        loud = np.flatnonzero(np.abs(wav) > 0.01)
        quiet = max(0, int(((loud[0] if len(loud) else 0) / SR - LEAD_S) * FPS))
        return wav[quiet * SR // FPS :], pos[quiet:], feats[quiet:].astype(np.float32)


class Units:
    """Semantic units: k-means inside every phone class over smoothed cepstra, pitch and place in the phone."""

    def __init__(self, path=UNITS):
        z = np.load(path)
        self.mean, self.std, self.w = z["mean"], z["std"], z["w"]
        self.cent, self.start, self.classes = z["cent"], z["start"], z["classes"]
        self.of = {int(c): i for i, c in enumerate(self.classes)}

    @staticmethod
    def labels(ids, pos, merge):
        """phone class per frame; stress marks take the class of the following phone."""
        ids = list(ids)
        for i in range(len(ids) - 2, -1, -1):
            if ids[i] in merge:
                ids[i] = ids[i + 1]
        lab = np.asarray(ids)[pos]
        # place of the frame inside its run of equal labels
        F = len(lab)
        cut = np.flatnonzero(np.diff(lab)) + 1
        s = np.concatenate([[0], cut])
        e = np.concatenate([cut, [F]])
        rel = np.concatenate([(np.arange(b - a) + 0.5) / (b - a) for a, b in zip(s, e)]).astype(np.float32)
        return lab, rel

    def __call__(self, ids, pos, feats):
        lab, rel = self.labels(ids, pos, MERGE)
        x = np.concatenate([feats, rel[:, None]], 1)
        x = (x - self.mean) / self.std * self.w
        n = int(np.floor(len(lab) / FPS * SEM_HZ))
        idx = np.minimum(((np.arange(n) + 0.5) / SEM_HZ * FPS).astype(np.int64), len(lab) - 1)
        out = np.zeros(n, np.int64)
        lab, x = lab[idx], x[idx]
        for c in np.unique(lab):
            k = self.of.get(int(c))
            if k is None:
                k = self.of[16]
            m = lab == c
            C = self.cent[self.start[k] : self.start[k + 1]]
            d = (C * C).sum(1)[None] - 2 * x[m] @ C.T
            out[m] = self.start[k] + d.argmin(1)
        return out, pos[idx]


MERGE = {156, 157}  # primary and secondary stress marks


def kmeans(x, k, iters=20, seed=0):
    rng = np.random.default_rng(seed)
    c = x[rng.choice(len(x), k, replace=len(x) < k)].copy()
    for _ in range(iters):
        d = (c * c).sum(1)[None] - 2 * x @ c.T
        a = d.argmin(1)
        n = np.bincount(a, minlength=k)
        s = np.zeros_like(c)
        np.add.at(s, a, x)
        c = np.where(n[:, None] > 0, s / np.maximum(n, 1)[:, None], x[rng.integers(0, len(x), k)])
    return c.astype(np.float32)


def fit_units(sents, model, V=768, dst=UNITS):
    """Once, on a few thousand sentences: what units.npz was made with."""
    t = Teacher(model)
    X, L = [], []
    for i, s in enumerate(sents):
        _, pos, f = t(s["ids"], 0, i)
        lab, rel = Units.labels(s["ids"], pos, MERGE)
        X.append(np.concatenate([f, rel[:, None]], 1))
        L.append(lab)
    X, L = np.concatenate(X), np.concatenate(L)
    mean, std = X.mean(0), X.std(0) + 1e-6
    w = np.ones(X.shape[1], np.float32)
    w[0] = 1.0
    w[1:N_CEP] = 1 / np.sqrt(1 + 0.25 * np.arange(1, N_CEP))
    w[N_CEP] = 1.6
    w[N_CEP + 1] = 0.4
    w[N_CEP + 2] = 1.0
    X = (X - mean) / std * w
    classes, cnt = np.unique(L, return_counts=True)
    keep = cnt >= 50
    classes, cnt = classes[keep], cnt[keep]
    # share of units: frames^0.6 times the class's spread
    spread = np.array([np.sqrt(X[c == L].var(0).sum()) for c in classes])
    sh = cnt**0.6 * spread
    K = np.maximum(2, np.floor(sh / sh.sum() * V)).astype(int)
    cap = np.minimum(np.where(classes == 0, 24, 36), cnt // 5)
    K = np.minimum(K, cap)
    while K.sum() > V:
        K[K.argmax()] -= 1
    while K.sum() < V:
        K[np.where(cap > K, sh / K, -1).argmax()] += 1
    cent = []
    for c, k in zip(classes, K):
        x = X[c == L]
        if len(x) > 20000:
            x = x[np.random.default_rng(0).choice(len(x), 20000, replace=False)]
        cent.append(kmeans(x, k))
    np.savez(
        dst,
        mean=mean,
        std=std,
        w=w,
        cent=np.concatenate(cent),
        start=np.concatenate([[0], np.cumsum(K)]),
        classes=classes,
    )
    return dict(zip(classes.tolist(), K.tolist()))
