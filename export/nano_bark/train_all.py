"""Make nano-bark again, by the clock: one GPU, one command.

    train_all.py --out /tmp/nano --minutes 22 --gpu 0 --workers 24 --corpus corpus.json.gz --weights start.safetensors

--weights: where training starts: semantic.*, the codec's encoder and decoder. A whole checkpoint's model.safetensors, with
training.pt beside it: the codec's codes stay, all else trains on; with --new-codes these too.

Starts everything, watches it, restarts what falls (once, from its checkpoint, with plain eager steps), assembles the
checkpoint every two minutes and says the held-out sentences at the end. OUT/progress.log has a JSON line per event,
OUT/*.txt what each part printed, OUT/pieces the newest checkpoint, OUT/clips the final speech, OUT/early an earlier one,
OUT/finished appears last. --no-listening: nothing is said, all the time is training. --smoke does the same with hardly
any steps, in minutes, on a CPU.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from steps import Run

HERE = Path(__file__).resolve().parent
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}


class Part:
    """A process of the run."""

    def __init__(self, run, name, *arguments, restarts=1, cpu_only=False, **environment):
        self.run, self.name, self.restarts = run, name, restarts
        self.command = [sys.executable, "-u", *map(str, arguments)]
        self.environment = os.environ | environment | (CPU_ONLY if cpu_only else {})
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
    parser.add_argument("--gpu", default="0", help="one, or two as 0,1: the second is for the three GPTs")
    parser.add_argument("--workers", type=int, default=24)
    parser.add_argument("--texts", type=int, default=46_000)
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus.json.gz")
    parser.add_argument("--weights", type=Path, default=HERE / "start.safetensors")
    parser.add_argument("--new-codes", action="store_true", help="the codec in --weights is only where training starts")
    parser.add_argument("--keep-semantic", action="store_true", help="the semantic model in --weights stays as it is")
    parser.add_argument("--no-listening", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    return parser.parse_args()


def schedule(options):
    """Seconds since the start: discriminators, codec frozen, semantic's and fine's end, all training's end; the early listening."""
    end = options.minutes * 60 - (40 if options.no_listening else 165)
    if options.smoke:
        return dict(first=20.0, gan=35.0, freeze=55.0, ready=30.0, semantic=200.0, fine=230.0, end=290.0, early=240.0)
    two = "," in options.gpu
    gan = freeze = 540.0 if two else 345.0
    fine, early = freeze + (0.3 if two else 0.32) * (end - freeze), freeze + 0.5 * (end - freeze)
    semantic = freeze - 60 if two else freeze + 300
    return dict(
        first=10.0, gan=gan, freeze=freeze, ready=freeze - 60, semantic=semantic, fine=fine, end=end, early=early
    )


class Work:
    """What runs, and what is to be started when."""

    def __init__(self, options, run, at):
        self.options, self.run, self.at, self.out = options, run, at, run.out
        self.teacher, self.model = self.out / "hibari_durations.onnx", self.out / "nano-bark"
        self.assemble = ["assemble.py", self.out]
        self.started = set()
        export = f"import teacher; teacher.export({str(self.teacher)!r})"
        subprocess.run([sys.executable, "-c", export], cwd=HERE, check=True)
        texts = [options.corpus.resolve(), self.teacher, self.out / "shards", options.workers, options.texts]
        self.corpus = Part(run, "corpus", "corpus.py", *texts, restarts=0, cpu_only=True)
        self.errands = [self.corpus]
        self.start = ["--weights", options.weights.resolve()]
        if options.keep_semantic:
            self.started.add("semantic")
            command = f"import assemble; assemble.keep({str(options.weights.resolve())!r}, 'semantic', {str(self.out)!r})"
            subprocess.run([sys.executable, "-c", command], cwd=HERE, check=True, env=os.environ | CPU_ONLY)
        codec = ["--gan", at["gan"], "--freeze", at["freeze"], "--end", at["end"], *self.start, *self.small("codec")]
        codec += ["--new-codes"] if options.new_codes else []
        self.trainers = [Part(run, "codec", "codec.py", self.out / "shards", self.out, "--t0", run.t0, *codec)]

    def small(self, name):
        if not self.options.smoke:
            return []
        return dict(
            codec=["--batch", 2, "--frames", 15, "--hours", 1, "--minimum-minutes", 1, "--warm", 5],
            semantic=["--batch", 2, "--minimum-texts", 20],
            coarse=["--batch", 2],
            fine=["--batch", 6, "--imitate-hours", 0.02],
            early=["--text", 2, "--diagnosis", 2],
            synthesize=["--text", 4, "--diagnosis", 2],
        )[name]

    def once(self, name, when, *command, needs=(), **more):
        """Start a part if it is time, it was not started before and there is what it needs."""
        if self.run.now() < when or name in self.started or not all((self.out / f).exists() for f in needs):
            return []
        self.started.add(name)
        return [Part(self.run, name, *command, **more)]

    def going(self):
        busy = any(part.process.poll() is None for part in self.trainers)
        return self.run.now() < self.at["end"] + (25 if busy else 0)

    def tick(self):
        self.trainers = [part for part in self.trainers if part.watch()]
        self.errands = [part for part in self.errands if part.watch()]
        if self.run.now() > self.at["freeze"]:
            self.corpus.stop()  # if it is not done by now, it is long enough
        ends = dict(semantic=self.at["semantic"], coarse=self.at["end"], fine=self.at["fine"])
        for kind, end in ends.items():
            command = ["gpt.py", kind, self.out, "--t0", self.run.t0, "--end", end, *self.start, *self.small(kind)]
            command += ["--corpus", self.options.corpus.resolve()] if kind == "semantic" else []
            gpu = self.options.gpu.split(",")[-1]
            when = self.at["first"] if kind == "semantic" else self.at["ready"]
            self.trainers += self.once(kind, when, *command, CUDA_VISIBLE_DEVICES=gpu)
        if not self.errands:
            self.errands += self.errand()

    def errand(self):
        """Every two minutes the checkpoint as it is; once, how it sounds."""
        listen = self.small("early") or ["--text", 24, "--diagnosis", 24]
        command = ["synthesize.py", self.model, self.teacher, self.out / "early", *listen]
        found = []
        if not self.options.no_listening:
            found = self.once("early", self.at["early"], *command, needs=["nano-bark"], restarts=0)
        for n in range(1, 20):
            when = self.at["freeze"] + n * (30 if self.options.smoke else 110)
            if not found and when < self.at["end"] - 20:
                needs = ["tokens", "codec.pt", "semantic.pt", "coarse.pt", "fine.pt"]
                found = self.once(f"assemble-{n}", when, *self.assemble, needs=needs, restarts=0, cpu_only=True)
        return found

    def finish(self):
        for part in [self.corpus, *self.trainers, *self.errands]:
            part.stop()
        self.run.log(event="trained")
        wait(Part(self.run, "assemble-last", *self.assemble, cpu_only=True))
        self.run.log(event="assembled", pieces=len(list(self.out.glob("pieces/*"))))
        if not self.options.no_listening:
            command = ["synthesize.py", self.model, self.teacher, self.out / "clips", *self.small("synthesize")]
            wait(Part(self.run, "synthesize", *command))


def wait(part):
    while part.watch():
        time.sleep(0.3)


def main():
    options = arguments()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": options.gpu.split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    os.environ |= {"OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
    run, at = Run("driver", out, time.time(), options.minutes * 60), schedule(options)
    run.log(event="begin", **at)
    work = Work(options, run, at)
    while work.going():
        time.sleep(1)
        work.tick()
    work.finish()
    run.log(event="finished")
    (out / "finished").write_text(f"{run.now():.0f}\n")


if __name__ == "__main__":
    main()
