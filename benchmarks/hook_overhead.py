"""What an edit costs at inference: the bare model, our patch, and SAELens' own wrapper, side by side in one run.

    python benchmarks/hook_overhead.py            # tables
    python benchmarks/hook_overhead.py --json     # the same, then one JSON object

Part 1 times the edit alone on activations of one token and of 512 tokens, for several widths of model and
dictionary: SAELens' wrapper with its error term, the whole encoding with a delta, and the k columns of a patch.
Part 2 times greedy generation of SmolLM2, each way in turn, on Hugging Face and on a TransformerBridge.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from concept_unlearn import LM, Clamp, FeaturePatch, SAEDictionary
from concept_unlearn.edits import Relative

K, CLAMP = 20, -20.0
SIZES = ((576, 9216), (576, 65_536), (2304, 16_384), (2304, 65_536))
PROMPTS = ["What is the capital of France?", "Tell me about the moon.", "Who wrote Hamlet?", "How do plants eat?"]
console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object last")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--pairs", type=int, default=7, help="rounds of the generation benchmark")
    parser.add_argument("--new-tokens", type=int, default=48)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with torch.inference_mode():
        edits = [time_edit(d, f, n, options.repeats) for d, f in SIZES for n in (1, 512)]
        generation = time_generation(options.pairs, options.new_tokens)
    show(edits, generation)
    if options.json:
        print(json.dumps({"k": K, "threads": torch.get_num_threads(), "edits": edits, "generation": generation}))


def make_sae(d: int, n_features: int) -> Any:
    """A random JumpReLU SAE in which about one feature in a hundred fires."""
    from sae_lens import SAE

    config = {"architecture": "jumprelu", "d_in": d, "d_sae": n_features, "dtype": "float32", "device": "cpu"}
    metadata = {"model_name": "random", "hook_name": "blocks.8.hook_resid_post"}
    sae = SAE.get_sae_class_for_architecture("jumprelu")(
        SAE.get_sae_config_class_for_architecture("jumprelu").from_dict({**config, "metadata": metadata})
    )
    torch.nn.init.normal_(sae.W_enc, std=d**-0.5)
    sae.W_dec.copy_(sae.W_enc.T)
    sae.threshold.fill_(2.3)
    return sae.eval()


def time_edit(d: int, n_features: int, n_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians in milliseconds; the ways take turns, each on an activation of its own."""
    from sae_lens.analysis.hooked_sae_transformer import _SAEWrapper

    sae = make_sae(d, n_features)
    features = list(range(0, n_features, n_features // K))[:K]
    dictionary = SAEDictionary(sae)
    chosen = dictionary.slice(features)
    wrapper = _SAEWrapper(sae, use_error_term=True)

    def clamp(acts: torch.Tensor) -> torch.Tensor:
        edited = acts.clone()
        edited[..., features] = torch.where(acts[..., features] > 0, CLAMP, acts[..., features])
        return edited

    def sae_lens(x: torch.Tensor) -> torch.Tensor:
        handle = sae.hook_sae_acts_post.register_forward_hook(lambda _, __, acts: clamp(acts))
        try:
            return wrapper(x)
        finally:
            handle.remove()

    def whole(x: torch.Tensor) -> torch.Tensor:
        acts = sae.encode(x)
        return x + sae.decode(clamp(acts)) - sae.decode(acts)

    def columns(x: torch.Tensor) -> torch.Tensor:
        acts, _ = chosen.encode(x)
        return x + (torch.where(acts > 0, CLAMP, acts) - acts) @ chosen.W_dec

    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {"sae_lens": sae_lens, "whole": whole, "columns": columns}
    samples = [torch.randn(1, n_tokens, d) for _ in range(repeats + 1)]
    want = whole(samples[0])
    for way in ways.values():
        torch.testing.assert_close(way(samples[0]), want, rtol=1e-3, atol=1e-3)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for x in samples[1:]:
        for name, way in ways.items():
            start = time.perf_counter()
            way(x)
            times[name].append(1000 * (time.perf_counter() - start))
    found = {name: statistics.median(values) for name, values in times.items()}
    ratios = {f"{name}_over_columns": found[name] / found["columns"] for name in ("sae_lens", "whole")}
    return (
        {"d_model": d, "n_features": n_features, "tokens": n_tokens} | {f"{n}_ms": t for n, t in found.items()} | ratios
    )


def time_generation(pairs: int, new_tokens: int) -> dict[str, Any]:
    """Seconds for the same prompts, all ways in turn; ratios are medians over rounds."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    from concept_unlearn.lm.embedded import find_embedded

    lm = LM.load("smollm2")
    sae = make_sae(lm.d_model, 9216)
    features = list(range(0, 9216, 460))[:K]
    patch = FeaturePatch(dictionary=sae, features=features, edit=Clamp(to=Relative(-0.1)))
    bridge = SAETransformerBridge.boot_transformers(
        str(find_embedded("smollm2")), hf_model=LM.load("smollm2").model, tokenizer=lm.tokenizer
    )

    @contextlib.contextmanager
    def wrapped() -> Iterator[None]:
        with bridge.saes(saes=[sae], use_error_term=True):
            yield

    encoded = [lm.encode(p, chat=True) for p in PROMPTS]

    def transformers_run() -> None:
        for ids in encoded:
            row = torch.tensor([ids])
            lm.model.generate(
                row,
                attention_mask=torch.ones_like(row),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=False,
            )

    def bridge_run() -> None:
        for ids in encoded:
            bridge.generate(
                torch.tensor([ids]),
                max_new_tokens=new_tokens,
                stop_at_eos=False,
                do_sample=False,
                verbose=False,
                prepend_bos=False,
            )

    def seconds(run: Callable[[], None], inside: Any) -> float:
        with inside:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

    ways = {
        "transformers": (transformers_run, contextlib.nullcontext),
        "patch": (transformers_run, lambda: patch.on(lm)),
        "bridge": (bridge_run, contextlib.nullcontext),
        "bridge_sae_lens": (bridge_run, wrapped),
    }
    transformers_run(), bridge_run()
    rounds = [{name: seconds(run, inside()) for name, (run, inside) in ways.items()} for _ in range(pairs)]

    def ratio(a: str, b: str) -> float:
        return statistics.median(r[a] / r[b] for r in rounds)

    tokens = len(PROMPTS) * new_tokens
    return {
        "tokens_per_second": {name: tokens / statistics.median(r[name] for r in rounds) for name in ways},
        "patch_over_transformers": ratio("patch", "transformers"),
        "sae_lens_over_bridge": ratio("bridge_sae_lens", "bridge"),
        "sae_lens_over_transformers": ratio("bridge_sae_lens", "transformers"),
    }


def show(edits: list[dict[str, Any]], generation: dict[str, Any]) -> None:
    table = Table(title=f"Editing {K} features, milliseconds (median)", title_justify="left")
    for name in (
        "d_model",
        "n_features",
        "tokens",
        "SAELens wrapper",
        "whole encoding",
        "k columns",
        "SAELens / columns",
    ):
        table.add_column(name, justify="right")
    for e in edits:
        times = (f"{e[name]:.3g}" for name in ("sae_lens_ms", "whole_ms", "columns_ms"))
        table.add_row(
            str(e["d_model"]), f"{e['n_features']:,}", str(e["tokens"]), *times, f"{e['sae_lens_over_columns']:.0f}x"
        )
    console.print(table)
    table = Table(title="Greedy generation of SmolLM2, one prompt at a time", title_justify="left")
    table.add_column("")
    table.add_column("tokens/s", justify="right")
    table.add_column("time over its bare model", justify="right")
    against = {"patch": "patch_over_transformers", "bridge_sae_lens": "sae_lens_over_bridge"}
    for name, rate in generation["tokens_per_second"].items():
        table.add_row(name, f"{rate:.1f}", f"x{generation[against[name]]:.3f}" if name in against else "")
    console.print(table)


if __name__ == "__main__":
    main()
