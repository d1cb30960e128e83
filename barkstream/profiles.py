"""Profiles of one's own: `configs/<profile>.pbtxt` like another profile's, for so many streams.

A limit on streams is one number of bark's configuration, but a GPT's stage must have as many KV slots and instances: a call for which
there is no instance waits in Triton's queue, first come, first served, whoever is in a hurry (what that did: docs/load-history.md).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

SPEAKER = "bark"
STAGES = "bark_semantic", "bark_coarse"  # what holds a slot and an instance for each stream


class ProfileError(Exception):
    """A profile that cannot be written; the message says why."""


def write_profile(
    repository: Path, name: str, like: str, n_streams: int | None = None, parameters: Mapping[str, str] | None = None
) -> list[Path]:
    """Write the profile `name` into the models of the repository that have the profile `like`; returns the files.

    n_streams: at most, for each GPU. parameters: of bark, others than `like` has. Raises ProfileError for a name that is taken or
    could be no file's, a profile that is not there, and a parameter that it does not have.
    """
    if not re.fullmatch(r"[\w.-]*\w", name):
        raise ProfileError(f"a profile's name has letters, digits, '-', '_' and '.', unlike {name!r}")
    there = sorted(repository.glob(f"*/configs/{like}.pbtxt"))
    if not there:
        raise ProfileError(f"no profile {like!r}: {repository} has {', '.join(known_profiles(repository)) or 'none'}")
    written = {path.with_name(f"{name}.pbtxt"): changed(path, n_streams, parameters or {}) for path in there}
    if taken := [str(path) for path in written if path.exists()]:
        raise ProfileError(f"there is a profile {name!r}: choose another name, or delete {', '.join(taken)}")
    for path, config in written.items():
        path.write_text(config)
    return list(written)


def known_profiles(repository: Path) -> list[str]:
    """Names of all that a model of the repository has."""
    return sorted({path.stem for path in repository.glob("*/configs/*.pbtxt")})


def chosen_config(model: Path, profile: str | None) -> str:
    """The configuration that Triton takes for the model in this folder: the profile's if it has one."""
    own = model / "configs" / f"{profile}.pbtxt"
    return (own if profile and own.exists() else model / "config.pbtxt").read_text()


def changed(path: Path, n_streams: int | None, parameters: Mapping[str, str]) -> str:
    """The configuration at `path` for so many streams and, of bark, with these parameters. Raises ProfileError for a parameter that it
    does not have, and for instances that are not written as ours are."""
    config = path.read_text()
    named = re.search(r'^name: "(\w+)"', config, re.MULTILINE)
    model = named[1] if named else ""
    if model == SPEAKER:
        limit = {} if n_streams is None else {"max_streams": str(n_streams)}
        return with_parameters(config, {**limit, **parameters})
    if model in STAGES and n_streams is not None:
        config = with_parameters(config, {"kv_slots": str(n_streams)})
        config, n = re.subn(r"(instance_group .*count: )\d+", rf"\g<1>{n_streams}", config)
        if n != 1:
            raise ProfileError(
                f"{path}: write the instances on one line, instance_group [ {{ kind: KIND_GPU count: 32 }} ]"
            )
    return config


def most_streams(config: str) -> int | None:
    """`max_streams` of a configuration of bark; None: it has none."""
    limit = re.search(r'key: "max_streams" value: { string_value: "(\d+)"', config)
    return int(limit[1]) if limit else None


def shortages(repository: Path, profile: str | None) -> list[str]:
    """A sentence for each GPT's stage of the repository that has fewer instances than `bark` takes streams, where one takes a call at a
    time: those whose instances hand calls on to the process that a GPU's stages share."""
    configs = {path.parent.name: chosen_config(path.parent, profile) for path in repository.glob("*/config.pbtxt")}
    limit = most_streams(configs.get(SPEAKER, ""))
    found = []
    for model in STAGES:
        config = configs.get(model, "")
        shares = re.search(r'key: "shares_process" value: { string_value: "true"', config)
        count = re.search(r"instance_group .*count: (\d+)", config)
        if limit and shares and count and int(count[1]) < limit:
            found.append(
                f"{model} has {count[1]} instances for {limit} streams (max_streams): calls beyond wait in Triton's queue, first come, "
                "first served. `barkstream profile NAME --like PROFILE --streams N` writes a profile with as many"
            )
    return found


def with_parameters(config: str, parameters: Mapping[str, str]) -> str:
    """A config.pbtxt whose parameters have these values. Raises ProfileError for one that it does not have."""
    for name, value in parameters.items():
        config, n = re.subn(rf'(key: "{re.escape(name)}" value: {{ string_value: ")[^"]*', rf"\g<1>{value}", config)
        if n != 1:
            known = re.findall(r'key: "(\w+)" value: { string_value:', config)
            raise ProfileError(f"no parameter {name!r}: there are {', '.join(known)}")
    return config


def setting(text: str) -> tuple[str, str]:
    """A parameter's name and value, of a command line's NAME=VALUE. Raises ArgumentTypeError for what is none."""
    name, is_there, value = text.partition("=")
    if not (name and is_there):
        raise argparse.ArgumentTypeError(f"write NAME=VALUE, not {text!r}")
    return name, value


def at_least_one(text: str) -> int:
    """A command line's number of streams. Raises ArgumentTypeError for what is none."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"write a number from 1 on, not {text!r}")
    return int(text)
