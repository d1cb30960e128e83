"""What the trainers share: a clock, a log, a step replayed as one CUDA graph, safe files."""

import json
import os
import sys
import time
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = int(
    os.environ.get("NANO_PLAIN", "0")
)  # what has failed before: 1 = no compiled blocks, 2 = no CUDA graphs either


class Run:
    """One trainer's wall clock and log. Times are seconds since the whole run began."""

    def __init__(self, name, out, t0, end):
        self.name, self.out, self.t0, self.end = name, Path(out), t0, end
        self.saved = self.now()

    def now(self):
        return time.time() - self.t0

    def left(self):
        return self.end - self.now()

    def log(self, **event):
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in event.items()}
        line = json.dumps({"t": round(self.now(), 1), "who": self.name, **rounded})
        print(line, flush=True)
        with (self.out / "progress.log").open("a") as file:
            file.write(line + "\n")

    def save_due(self, every=45):
        if self.now() - self.saved < every:
            return False
        self.saved = self.now()
        return True


def save(path, state):
    partial = Path(f"{path}.partial")
    torch.save(state, partial)
    partial.replace(path)


def settings():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    if DEVICE == "cpu":
        torch.set_num_threads(2)


def autocast():
    return torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda", cache_enabled=False)


def adamw(params, lr, betas, weight_decay):
    params = list(params)
    groups = [
        dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
        dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
    ]
    cuda = DEVICE == "cuda"
    rate = torch.tensor(lr, device=DEVICE) if cuda else lr
    return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=cuda, capturable=cuda)


def add_group(optimizer, params, times):
    """More parameters, learning faster than the others."""
    rate = optimizer.param_groups[0]["lr"]
    rate = rate.clone() if torch.is_tensor(rate) else rate
    optimizer.add_param_group(dict(params=list(params), weight_decay=0.0, lr=rate, times=times))


def set_rate(optimizer, lr):
    for group in optimizer.param_groups:
        rate = lr * group.get("times", 1)
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def captured(step, optimizers, run, compiled=False):
    """step() -> metrics, as one CUDA graph: no launch costs, whatever the CPUs are busy with. Where that fails, the
    process starts itself again, first without compiled blocks, then with eager steps."""
    if DEVICE == "cpu" or PLAIN > 1:
        return step
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(4):
                step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            metrics = step()
    except Exception as error:
        run.log(event="capture failed, starting again", error=repr(error)[:500])
        os.environ["NANO_PLAIN"] = "1" if compiled and not PLAIN else "2"
        os.execv(sys.executable, [sys.executable, *sys.argv])

    def replay():
        graph.replay()
        return metrics

    return replay


def learn(loss, params, optimizer, most):
    """One optimizer step on these parameters alone; a gradient that is no number does no harm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=params)
    torch.nn.utils.clip_grad_norm_(params, most)
    for p in params:
        p.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()


class Average:
    """Moving average of parameters, in place on the device: capturable."""

    def __init__(self, params, decay=0.999):
        self.params, self.decay = list(params), decay
        self.mean = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.params], 1 - self.decay)

    @torch.no_grad()
    def reset(self):
        torch._foreach_copy_(self.mean, [p.detach() for p in self.params])


class Corpus:
    """Shards on the device: wav [frames, 320] int16, unit and voice of every frame, and the utterances' sizes. Grows."""

    def __init__(self, folder, max_hours):
        n = int(max_hours * 3600 * 75)
        self.folder, self.files, self.n = Path(folder), [], 0
        self.wav = torch.zeros(n, 320, dtype=torch.int16, device=DEVICE)
        self.unit = torch.zeros(n, dtype=torch.int16, device=DEVICE)
        self.voice = torch.zeros(n, dtype=torch.int8, device=DEVICE)
        self.n_frames = torch.zeros((), device=DEVICE)  # self.n, where a captured step can read it
        self.sem, self.meta = [], []

    def grow(self, only=None):
        import numpy as np

        known = set(self.files)
        for file in only or sorted(p.name for p in self.folder.glob("s*.npz")):
            if file in known:
                continue
            z = np.load(self.folder / file)
            wav, meta = torch.from_numpy(z["wav"]).view(-1, 320), z["meta"]
            if self.n + len(wav) > len(self.wav):
                break
            place = slice(self.n, self.n + len(wav))
            self.wav[place] = wav.to(DEVICE)
            self.unit[place] = torch.from_numpy(frame_units(z["sem"], meta)).to(DEVICE)
            self.voice[place] = torch.from_numpy(np.repeat(meta[:, 0], meta[:, 1]).astype(np.int8)).to(DEVICE)
            self.sem.append(z["sem"]), self.meta.append(meta), self.files.append(file)
            self.n += len(wav)
        self.n_frames.fill_(float(self.n))
        return self.n

    @property
    def complete(self):
        return (self.folder / "done").exists()


def frame_units(sem, meta):
    """The unit sounding in the middle of each frame, utterance by utterance."""
    import numpy as np

    parts, start = [], 0
    for _, n_frames, n_units, _ in meta:
        at = ((np.arange(n_frames) + 0.5) / 75 * 49.9).astype(int)
        parts.append(sem[start + np.minimum(at, n_units - 1)])
        start += n_units
    return np.concatenate(parts).astype(np.int16)
