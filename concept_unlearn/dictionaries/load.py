"""A dictionary from its name: a shipped one, a folder of SAELens' or of a codebook, a SAELens release, or the Hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from ..errors import CorruptArtifact, UnknownName
from ..lm import Site
from .base import Dictionary
from .codebook import Codebook
from .sae import SAEDictionary, certificate

ASSETS = Path(__file__).parent / "assets"


def shipped() -> list[str]:
    """Names of the dictionaries that come with the package, ``model/site``."""
    return sorted(str(config.parent.relative_to(ASSETS)) for config in ASSETS.glob("*/*/cfg.json"))


def load_dictionary(name: str | Path, *, site: str | Site | None = None, device: str = "cpu") -> Dictionary:
    """By what ``name`` is, in this order:

    - ``smollm2/blocks.7.hook_resid_post``: shipped;
    - a folder with SAELens' ``cfg.json`` and weights, or a codebook's;
    - ``release/sae_id`` of a SAELens release, say ``gemma-scope-2b-pt-res-canonical/layer_20/width_16k/canonical``;
    - ``user/repo`` or ``user/repo/folder`` on the Hub.

    ``site`` overrides what the SAE's own metadata says. Computes in float32. Raises UnknownName,
    CorruptArtifact, NotExact or SiteNotFound.
    """
    text = str(name)
    if text in shipped():
        return _from_folder(ASSETS / text, text, site, device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, folder.name, site, device)
    return _from_release(text, site, device)


def _from_folder(folder: Path, name: str, site: str | Site | None, device: str) -> Dictionary:
    from safetensors import SafetensorError

    architecture = _architecture(folder)
    if architecture == "codebook":
        return Codebook.load(folder, name=name, site=site).to(device)
    certificate(architecture)
    try:
        sae = _sae_class().load_from_disk(folder, device=device, dtype="float32")
    except (SafetensorError, FileNotFoundError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CorruptArtifact(f"{folder} is not a whole SAELens dictionary: {error}") from error
    return _wrap(sae, name, site)


def _architecture(folder: Path) -> str:
    """Read before SAELens does, which knows neither its own training classes nor a file that is not JSON."""
    try:
        config = json.loads((folder / "cfg.json").read_text())
    except FileNotFoundError:
        raise CorruptArtifact(f"{folder} holds no cfg.json, so no SAELens dictionary") from None
    except ValueError as error:
        raise CorruptArtifact(f"{folder / 'cfg.json'} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CorruptArtifact(f"{folder / 'cfg.json'} is not the config of a SAELens dictionary")
    return str(config.get("architecture", "standard"))


def _from_release(text: str, site: str | Site | None, device: str) -> SAEDictionary:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    release, _, sae_id = text.partition("/")
    if release in releases:
        if sae_id not in releases[release].saes_map:
            raise UnknownName(f"SAE in release {release}", sae_id, releases[release].saes_map)
    elif text.count("/") >= 1 and " " not in text and release not in {name.split("/")[0] for name in shipped()}:
        user, repo, *inside = text.split("/")
        release, sae_id = f"{user}/{repo}", "/".join(inside)
    else:
        raise UnknownName("dictionary", text, [*shipped(), *releases])
    try:
        sae: Any = _sae_class().from_pretrained(release, sae_id, device=device)
    except (OSError, ValueError) as error:
        hint = f"Neither a folder nor on the Hub or in its cache: {str(error).splitlines()[0]}"
        raise UnknownName("dictionary", text, shipped(), hint) from error
    return _wrap(sae, text, site)


def _sae_class() -> Any:
    """SAELens is slow to import, so it is imported at first use."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_lens import SAE

    return SAE


def _wrap(sae: Any, name: str, site: str | Site | None) -> SAEDictionary:
    certificate(sae.cfg.architecture())
    return SAEDictionary(sae.eval(), name=name, site=site)
