"""Make nano-bark again, by the clock: one GPU, one command.

    train_all.py --out /tmp/nano --minutes 22 --gpu 0 --workers 24 --corpus corpus.json.gz --semantic semantic.safetensors

Starts everything, watches it, restarts what falls (once, from its checkpoint, with plain eager steps), assembles the
checkpoint every three minutes and says the held-out sentences at the end. OUT/progress.log has a JSON line per event,
OUT/*.txt what each part printed, OUT/pieces the newest checkpoint, OUT/clips the final speech, OUT/early an earlier one,
OUT/finished appears last. --smoke does the same with hardly any steps, in minutes, on a CPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from steps import Run

HERE = Path(__file__).resolve().parent


class Part:
    """A process of the run."""

    def __init__(self, run, name, *arguments, restarts=1, cpu_only=False, **environment):
        self.run, self.name, self.restarts = run, name, restarts
        self.command = [sys.executable, "-u", *map(str, arguments)]
        self.environment = os.environ | environment | ({"CUDA_VISIBLE_DEVICES": ""} if cpu_only else {})
        self.start()

    def start(self):
        with (self.run.out / f"{self.name}.txt").open("a") as file:
            self.process = subprocess.Popen(
                self.command, stdout=file, stderr=file, env=self.environment, cwd=HERE, start_new_session=True
            )
        self.run.log(event="started", part=self.name)

    def watch(self):
        """-> still to be waited for?"""
        code = self.process.poll()
        if code is None:
            return True
        if code and self.restarts:
            self.restarts -= 1
            self.run.log(event="fell, restarting", part=self.name, code=code)
            self.environment["NANO_PLAIN"] = "2"
            self.start()
            return True
        if code and code != -15:
            self.run.log(event="fell", part=self.name, code=code)
        return False

    def stop(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, 15)


def arguments():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=22.0)
    parser.add_argument("--gpu", default="0")
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--texts", type=int, default=46_000)
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus.json.gz")
    parser.add_argument("--semantic", type=Path, default=HERE / "semantic.safetensors")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def schedule(options):
    """Seconds since the start: discriminators, codec frozen, fine's end, all training's end; the early listening."""
    end = options.minutes * 60 - 165
    if options.smoke:
        return dict(gan=45.0, freeze=75.0, ready=40.0, fine=160.0, end=250.0, early=170.0)
    return dict(
        gan=100.0, freeze=300.0, ready=200.0, fine=300 + 0.56 * (end - 300), end=end, early=300 + 0.5 * (end - 300)
    )


def main():
    options = arguments()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"CUDA_VISIBLE_DEVICES": options.gpu, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {
        "OMP_NUM_THREADS": "2",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False",
    }
    t0 = time.time()
    run, at = Run("driver", out, t0, options.minutes * 60), schedule(options)
    run.log(event="begin", **at)
    teacher = out / "hibari_durations.onnx"
    export = f"import teacher; teacher.export({str(teacher)!r})"
    subprocess.run([sys.executable, "-c", export], cwd=HERE, check=True)
    shards = out / "shards"
    small = ["--batch", 2, "--frames", 15] if options.smoke else []
    corpus = Part(
        run,
        "corpus",
        "corpus.py",
        options.corpus.resolve(),
        teacher,
        shards,
        options.workers,
        options.texts,
        restarts=0,
        cpu_only=True,
    )
    codec = ["--t0", t0, "--gan", at["gan"], "--freeze", at["freeze"], "--end", at["end"], *small]
    codec += ["--hours", 1, "--minimum-minutes", 1, "--warm", 5] if options.smoke else []
    parts = [corpus, Part(run, "codec", "codec.py", shards, out, *codec)]
    batch = {"coarse": 2, "fine": 6} if options.smoke else {"coarse": 64, "fine": 48}
    errands, done = [], set()

    def once(name, when, *arguments, needs=(), restarts=0, **more):
        ready = all((out / f).exists() for f in needs)
        if run.now() > when and name not in done and ready:
            done.add(name)
            return Part(run, name, *arguments, restarts=restarts, **more)
        return None

    assemble = ["assemble.py", out, options.semantic.resolve()]
    trained = ["tokens", "codec.pt", "coarse.pt", "fine.pt"]
    listen = ["--text", 2, "--diagnosis", 2] if options.smoke else ["--text", 24, "--diagnosis", 24]
    while run.now() < at["end"] + 25 and (run.now() < at["end"] or any(p.process.poll() is None for p in parts)):
        time.sleep(1)
        for part in list(parts):
            if not part.watch():
                parts.remove(part)
        for part in [e for e in errands if not e.watch()]:
            errands.remove(part)
        if run.now() > at["freeze"] and corpus.process.poll() is None:
            corpus.stop()
            run.log(event="corpus stopped, unfinished")
        for kind, end in (("coarse", at["end"]), ("fine", at["fine"])):
            more = ["--t0", t0, "--end", end, "--batch", batch[kind]]
            more += ["--imitate-hours", 0.02] if options.smoke else []
            if part := once(kind, at["ready"], "gpt.py", kind, out, *more, restarts=1):
                parts.append(part)
        busy = any(e.name.startswith("assemble") for e in errands)
        for minute in range(3, int(options.minutes), 3):
            when = at["freeze"] + minute * (10 if options.smoke else 60)
            if (
                when < at["end"] - 20
                and not busy
                and (part := once(f"assemble-{minute}", when, *assemble, needs=trained, cpu_only=True))
            ):
                errands.append(part)
                busy = True
        early = ["synthesize.py", out / "nano-bark", teacher, out / "early", *listen]
        if not busy and (part := once("early", at["early"], *early, needs=["nano-bark"])):
            errands.append(part)
    for part in [*parts, *errands]:
        part.stop()
    run.log(event="trained")
    final = Part(run, "assemble-last", *assemble, restarts=1, cpu_only=True)
    while final.watch():
        time.sleep(0.3)
    run.log(event="assembled", pieces=len(list((out / "pieces").glob("*"))))
    listen = ["--text", 4, "--diagnosis", 2] if options.smoke else []
    final = Part(run, "synthesize", "synthesize.py", out / "nano-bark", teacher, out / "clips", *listen, restarts=1)
    while final.watch():
        time.sleep(0.3)
    run.log(event="finished")
    (out / "finished").write_text(f"{run.now():.0f}\n")


if __name__ == "__main__":
    main()
