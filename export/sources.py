"""Where a checkpoint comes from: a directory (Hugging Face's or Suno's format) or a Hugging Face hub id."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType

from barkstream.export.checkpoint import Source, open_huggingface
from barkstream.export.suno import is_suno, open_suno, read_suno_voices
from barkstream.export.tensors import CheckpointError, existing

SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "speaker_embeddings_path.json",
    "speaker_embeddings/**",
]
BERT = "google-bert/bert-base-multilingual-cased"  # Bark's tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a Hugging Face BarkModel directory, its hub id (suno/bark-small), or a directory of Suno's .pt files",
    )
    parser.add_argument(
        "--codec",
        help="with Suno's files: an EnCodec directory, hub id or .th file (default: the encodec package's weights)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help=f"a tokenizer.json (default: the checkpoint's; with Suno's files {BERT}'s)"
    )
    parser.add_argument(
        "--voices",
        type=Path,
        help="a folder of voice presets as .npz, such as Suno's bark/assets/prompts, added to the checkpoint's",
    )
    parser.add_argument("--name", help="what to call the checkpoint (default: its directory's or repository's name)")


def open_source(args: argparse.Namespace) -> Source:
    """Raises CheckpointError if the checkpoint cannot be found or read."""
    directory = Path(args.checkpoint)
    if not directory.is_dir():
        directory = download(args.checkpoint)
    name = args.name or Path(args.checkpoint).resolve().name
    if is_suno(directory):
        source = open_suno(directory, args.tokenizer or download_tokenizer(), local_codec(args.codec), name)
    else:
        source = open_huggingface(directory, args.tokenizer, name)
    if args.voices:
        source = replace(
            source, voices={**source.voices, **read_suno_voices(existing(args.voices, "the folder of voices"))}
        )
    return source


def local_codec(codec: str | None) -> str | None:
    return codec if codec is None or Path(codec).exists() else str(download(codec))


def download(repository: str) -> Path:
    """A checkpoint from the Hugging Face hub, through its cache. Weights in one format only: safetensors if offered."""
    hub = _hub(repository)
    try:
        return Path(
            hub.snapshot_download(
                repository, allow_patterns=[*SMALL_FILES, *_weight_files(hub.HfApi().list_repo_files(repository))]
            )
        )
    except Exception as error:  # the hub client raises its own, its HTTP library's and OSErrors
        reason = _first_line(error)
    try:
        kept = Path(hub.snapshot_download(repository, local_files_only=True))
        print(
            f"the Hugging Face hub did not give '{repository}' ({reason}): taking the copy kept in {kept}",
            file=sys.stderr,
        )
        return kept
    except Exception:  # as above: whatever it was, there is no copy either
        raise CheckpointError(
            f"no directory '{repository}', and the Hugging Face hub did not give it ({reason})"
        ) from None


def _weight_files(names: list[str]) -> list[str]:
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        patterns = [f"{stem}.{ending}", f"{stem}.{ending}.index.json", f"{stem}-*.{ending}"]
        if any(fnmatch(name, pattern) for name in names for pattern in patterns):
            return patterns
    return []


def download_tokenizer() -> Path:
    try:
        return Path(_hub(BERT).hf_hub_download(BERT, "tokenizer.json"))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"cannot download {BERT}'s tokenizer.json ({_first_line(error)}); give a local one with --tokenizer"
        ) from None


def _hub(repository: str) -> ModuleType:
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise CheckpointError(
            f"no checkpoint at '{repository}': no such directory, and a hub id looks like suno/bark-small"
        )
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"no directory '{repository}'; to download it from the hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
