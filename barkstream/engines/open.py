"""Opens a stage on the engine that a deployment names, ready to serve: weights loaded, kernels built, warmed up.

Only the engine that is asked for is imported: a CPU needs no PyTorch, a GPU no ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from barkstream.engines import Chunk, Generation, Head, Row, Window
from barkstream.sampling import Floats, Ints
from barkstream.tokens import Checkpoint

CausalStageName = Literal["semantic", "coarse"]
StageName = Literal["semantic", "coarse", "fine", "codec"]
ENGINES = ("onnxruntime", "cuda")
# What a stage's engine does with a batch.
VERBS = dict(semantic="generate", coarse="generate", fine="fill", codec="decode")


@dataclass(frozen=True)
class Spec:
    """What a stage runs on."""

    stage: StageName
    engine: str
    path: Path  # its model.onnx
    checkpoint: Checkpoint
    max_batch: int
    n_slots: int = 0  # of a GPT: streams whose KV cache is kept
    frames: tuple[int, ...] = ()  # of fine and codec: lengths that a GPU prepares for
    n_threads: int = 0  # of the CPU; 0: all cores
    device: int = 0  # which GPU
    bits: int = 16  # of a GPT's weights on a GPU: 16 or 8
    kv_bits: int | None = None  # of its keys and values; None: as many

    @property
    def is_causal(self) -> bool:
        return self.stage in ("semantic", "coarse")


class EngineError(RuntimeError):
    """The engine cannot run here; the message says why, and what to do."""


class CausalEngine(Protocol):
    """What generates tokens. One thread at a time may use it."""

    @property
    def n_owned_slots(self) -> int: ...

    @property
    def row_counts(self) -> Sequence[int]:
        """Numbers of rows whose costs are worth measuring."""

    def generate(self, rows: list[Row]) -> list[Generation]: ...

    def release(self, *streams: int) -> None: ...


class FineEngine(Protocol):
    """What fills windows. One thread at a time may use it."""

    def fill(self, windows: Sequence[Window]) -> list[Ints]: ...


class CodecEngine(Protocol):
    """What decodes chunks. One thread at a time may use it."""

    def decode(self, chunks: Sequence[Chunk]) -> list[tuple[Floats, Floats]]: ...


def open_stage(spec: Spec) -> CausalEngine | FineEngine | CodecEngine:
    """Any stage. Raises EngineError, FileNotFoundError or ValueError, each with what to do."""
    where = dict(n_threads=spec.n_threads, device=spec.device)
    if spec.stage == "fine" or spec.stage == "codec":
        open_engine = open_fine if spec.stage == "fine" else open_codec
        return open_engine(spec.engine, spec.path, spec.checkpoint, spec.max_batch, spec.frames, **where)
    return open_causal(
        spec.engine,
        spec.stage,
        spec.path,
        spec.checkpoint,
        spec.n_slots,
        spec.max_batch,
        **where,
        bits=spec.bits,
        kv_bits=spec.kv_bits,
    )


def open_causal(
    engine: str,
    stage: CausalStageName,
    path: Path,
    checkpoint: Checkpoint,
    n_slots: int,
    max_batch: int,
    n_threads: int = 0,
    device: int = 0,
    bits: int = 16,
    kv_bits: int | None = None,
) -> CausalEngine:
    """The semantic or coarse stage. path: its model.onnx. n_threads: of the CPU, 0 for all cores. device: which GPU; bits, kv_bits: of
    weights there, and of keys and values (None: as many).

    Raises EngineError, FileNotFoundError or ValueError, each with what to do.
    """
    layout = checkpoint.semantic if stage == "semantic" else checkpoint.coarse
    head = Head.semantic(checkpoint.semantic) if stage == "semantic" else Head.coarse(checkpoint.coarse)
    if is_cpu(engine):
        if bits != 16 or kv_bits is not None:
            name, value = ("bits", bits) if bits != 16 else ("kv_bits", kv_bits)
            raise EngineError(
                f"{name} {value} is the cuda engine's; on a CPU the artifact says it: barkstream export --int8"
            )
        from barkstream.engines.onnxruntime import CausalEngine as CpuEngine

        on_cpu = CpuEngine(path, layout.size, head, n_slots, max_batch, n_threads)
        on_cpu.warm_up()
        return on_cpu
    use_gpu(device)
    from barkstream.engines.cuda import CudaEngine

    # No cache for positions that nobody can reach.
    size = replace(layout.size, block_size=n_positions(stage, checkpoint))
    # The semantic stage prefills once a sentence, coarse 2.5 times a second of speech.
    on_gpu = CudaEngine.load(
        path, size, head, n_slots, max_batch, one_copy=stage == "semantic", bits=bits, kv_bits=kv_bits
    )
    on_gpu.warm_up(prefix_lengths(stage, checkpoint))
    give_back_memory()
    return on_gpu


def prefix_lengths(stage: CausalStageName, checkpoint: Checkpoint) -> list[int]:
    """Positions that a stage's usual prefills fill, all of a prefix but its last: the shortest first.

    Without a preset a sentence's coarse history grows window by window; what is not warmed up is captured while listeners wait.
    """
    if stage == "semantic":
        return [checkpoint.semantic.n_prompt_positions - 1]
    layout = checkpoint.coarse
    histories = {*range(0, layout.max_history, layout.window), layout.max_history}
    return [layout.n_semantic_window + n for n in sorted(histories)]


def tokens_a_second(stage: CausalStageName, checkpoint: Checkpoint) -> float:
    """Of speech."""
    coarse = checkpoint.coarse
    return checkpoint.semantic.rate_hz if stage == "semantic" else coarse.rate_hz * coarse.n_codebooks


def n_positions(stage: CausalStageName, checkpoint: Checkpoint) -> int:
    """The most that a stage's windows take: a multiple of 64, and no more than the model has."""
    if stage == "semantic":
        return checkpoint.semantic.size.block_size
    coarse = checkpoint.coarse
    return min(-(-coarse.max_positions // 64) * 64, coarse.size.block_size)


def open_fine(
    engine: str,
    path: Path,
    checkpoint: Checkpoint,
    max_batch: int,
    frames: Sequence[int],
    n_threads: int = 0,
    device: int = 0,
) -> FineEngine:
    """The fine stage. frames: lengths of windows that a GPU prepares for. The rest as for open_causal."""
    if is_cpu(engine):
        from barkstream.engines.onnxruntime import FineEngine as CpuEngine

        return CpuEngine(path, n_threads)
    use_gpu(device)
    from barkstream.engines.cuda_fine import FineEngine as GpuEngine

    on_gpu = GpuEngine.load(path, checkpoint.fine, max_batch)
    on_gpu.warm_up(frames)
    give_back_memory()
    return on_gpu


def open_codec(
    engine: str,
    path: Path,
    checkpoint: Checkpoint,
    max_batch: int,
    frames: Sequence[int],
    n_threads: int = 0,
    device: int = 0,
) -> CodecEngine:
    """The codec's decoder. frames: lengths of chunks that a GPU prepares for. The rest as for open_causal."""
    if is_cpu(engine):
        from barkstream.engines.onnxruntime import CodecEngine as CpuEngine

        return CpuEngine(path, n_threads)
    use_gpu(device)
    from barkstream.engines.cuda_codec import CodecEngine as GpuEngine

    on_gpu = GpuEngine.load(path, checkpoint.codec, max_batch)
    on_gpu.warm_up(frames)
    give_back_memory()
    return on_gpu


def is_cpu(engine: str) -> bool:
    """Whether the engine runs on the CPU. Raises EngineError for a name that is none."""
    if engine not in ENGINES:
        raise EngineError(f"no engine {engine!r}: {' or '.join(ENGINES)}")
    return engine == "onnxruntime"


def use_gpu(device: int) -> None:
    """This process's GPU from now on. Raises EngineError where there is none."""
    try:
        import torch
    except ImportError:
        raise EngineError("the cuda engine needs PyTorch: pip install 'barkstream[torch]'") from None
    if not torch.cuda.is_available():
        raise EngineError("the cuda engine needs an NVIDIA GPU, and PyTorch finds none: use the default profile")
    torch.cuda.set_device(device)


def give_back_memory() -> None:
    """What loading took and serving does not need: float32 copies of the weights, and the like."""
    import torch

    torch.cuda.empty_cache()
