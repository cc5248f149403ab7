"""A patch on disk: ``config.json``, which names its tensor file and that file's hash, and safetensors.

The tensors are written first under a name of their own and the config last, in one atomic step, so a folder
always holds a whole patch: the old one until the very end, then the new one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as dump_tensors

from ..errors import CorruptArtifact, InvalidConfig, UnknownName
from ..files import write_atomically
from ..lm import LM
from .base import Patch
from .origin import Origin

FORMAT = 1


def save(patch: Patch, folder: Path, made: Mapping[str, Any] | None = None) -> Path:
    if patch.origin is None:
        raise InvalidConfig("this patch has not met its model yet: patch.save(folder, lm), or calibrate it first")
    folder.mkdir(parents=True, exist_ok=True)
    content = dump_tensors(
        {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in patch.tensors().items()}
    )
    digest = hashlib.sha256(content).hexdigest()
    config = {
        "format": FORMAT,
        "kind": patch.kind,
        "origin": patch.origin.model_dump(mode="json"),
        "tensors": {"file": f"patch-{digest[:12]}.safetensors", "sha256": digest},
        "patch": patch.spec(),
        **({} if made is None else {"made": dict(made)}),
    }
    write_atomically(folder / config["tensors"]["file"], content)  # type: ignore[index]
    write_atomically(folder / "config.json", json.dumps(config, indent=1).encode())
    for stale in folder.glob("patch-*.safetensors"):
        if stale.name != config["tensors"]["file"]:  # type: ignore[index]
            stale.unlink()
    return folder


def load_patch(
    folder: str | Path, lm: LM | None = None, *, any_base: bool = False, revision: str | None = None
) -> Patch:
    """A saved patch, from a folder or a Hub repository. With ``lm`` its canary is tried on that model.

    Raises CorruptArtifact, PatchMismatch (another base; ``any_base=True`` asks the canary alone) or
    PatchNotReached.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        path = _from_hub(str(folder), revision)
    config = _read_config(path / "config.json")
    tensors = _read_tensors(path, config["tensors"])
    if config["kind"] not in Patch.kinds:
        raise UnknownName("kind of patch", config["kind"], Patch.kinds)
    origin = Origin(**config["origin"])
    patch = Patch.kinds[config["kind"]].restore(config["patch"], tensors, origin)
    if lm is not None:
        origin.check(patch, lm, any_base=any_base)
    return patch


def push_to_hub(patch: Patch, repo_id: str, *, private: bool) -> str:
    import tempfile

    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as scratch:
        save(patch, Path(scratch))
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=scratch, commit_message=f"{patch.kind} patch"))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise CorruptArtifact(f"{path.parent} holds no config.json, so no patch") from None
    except json.JSONDecodeError as error:
        raise CorruptArtifact(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not {"format", "kind", "origin", "tensors", "patch"} <= set(config):
        raise CorruptArtifact(f"{path} is not the config of a patch")
    if config["format"] != FORMAT:
        raise CorruptArtifact(f"{path} has format {config['format']}; this version reads {FORMAT}")
    return config


def _read_tensors(folder: Path, entry: dict[str, str]) -> dict[str, Any]:
    path = folder / entry["file"]
    if not path.is_file():
        raise CorruptArtifact(f"{path} is missing")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise CorruptArtifact(f"{path} is truncated or altered: its SHA-256 is not the one in config.json")
    return load_tensors(content)


def _from_hub(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    if repo_id.count("/") != 1:
        raise CorruptArtifact(f"no folder {repo_id!r}, and it is not a Hub id like user/patch")
    return Path(snapshot_download(repo_id, revision=revision, allow_patterns=["config.json", "*.safetensors"]))
