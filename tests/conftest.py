"""Tiny models built from configs, a word-level tokenizer, and a planted dictionary. No network, no downloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn

from concept_unlearn.data.scope import Scope
from concept_unlearn.lm import LM, Site

VOCAB = 48
D_MODEL = 16
N_LAYERS = 3
BOS, EOS, PAD = 0, 1, 2

_SHARED = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHARED, num_key_value_heads=1),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=D_MODEL, n_layer=N_LAYERS, n_head=2, n_positions=256,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**_SHARED),
    "gemma2": lambda: transformers.Gemma2Config(**_SHARED, num_key_value_heads=1, head_dim=8),
    "qwen2": lambda: transformers.Qwen2Config(**_SHARED, num_key_value_heads=1),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=VOCAB, hidden_size=D_MODEL, num_hidden_layers=N_LAYERS, num_attention_heads=2, ffn_dim=32,
        word_embed_proj_dim=D_MODEL, max_position_embeddings=256, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
    ),
}  # fmt: skip


def make_hf(kind: str = "llama", seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    with torch.no_grad():
        for parameter in model.parameters():  # the default initialisation is too small for an edit to show
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.generation_config.eos_token_id = EOS
    return model.eval()


def make_hooked(folder: Any, seed: int = 0) -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(seed)
    config = HookedTransformerConfig(
        n_layers=N_LAYERS, d_model=D_MODEL, n_ctx=256, d_head=8, n_heads=2, d_mlp=32, d_vocab=VOCAB,
        act_fn="gelu", device="cpu", seed=seed, model_name="tiny", default_prepend_bos=False,
    )  # fmt: skip
    make_tokenizer().save_pretrained(folder)  # TransformerLens loads it anew
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return HookedTransformer(config, tokenizer=tokenizer, default_padding_side="right").eval()


def make_bridge(folder: Any, seed: int = 0) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    make_hf("llama", seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), tokenizer=transformers.AutoTokenizer.from_pretrained(folder)
    )


def make_tokenizer(vocab: int = VOCAB) -> Any:
    """w4 is id 4 and so on; the chat template wraps a message in w4 ... w5 and opens the answer with w6."""
    words = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD, "<unk>": 3} | {f"w{i}": i for i in range(4, vocab)}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = "{% for m in messages %}w4 {{ m['content'] }} w5 {% endfor %}w6"
    return tokenizer


def words(*ids: int) -> str:
    return " ".join(f"w{i}" for i in ids)


@pytest.fixture
def fresh_compiler():
    """torch.compile remembers from one test to the next."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=list(CONFIGS))
def any_hf(request: pytest.FixtureRequest) -> LM:
    return LM(make_hf(request.param), make_tokenizer(), name=request.param)


@pytest.fixture(params=["llama", "hooked", "bridge"])
def any_lm(request: pytest.FixtureRequest, tmp_path: Any) -> LM:
    """One model of each library."""
    if request.param == "hooked":
        return LM(make_hooked(tmp_path))
    if request.param == "bridge":
        return LM(make_bridge(tmp_path))
    return LM(make_hf(), make_tokenizer(), name="llama")


@pytest.fixture
def lm() -> LM:
    return LM(make_hf(), make_tokenizer(), name="tiny-llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(6, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def make_sae(
    architecture: str = "standard", *, d_in: int = D_MODEL, d_sae: int = 40, seed: int = 0, **settings: Any
) -> Any:
    """A random SAELens SAE of any inference architecture, with every parameter away from its initial value."""
    from sae_lens import SAE

    site = settings.pop("hook_name", "blocks.1.hook_resid_post")
    metadata = {"model_name": "tiny", "hook_name": site, "hook_name_out": settings.pop("hook_name_out", None)}
    config = {
        "architecture": architecture, "d_in": d_in, "d_sae": d_sae, "dtype": "float64", "device": "cpu",
        "apply_b_dec_to_input": False, "metadata": {k: v for k, v in metadata.items() if v}, **settings,
    }  # fmt: skip
    torch.manual_seed(seed)
    sae = SAE.get_sae_class_for_architecture(architecture)(
        SAE.get_sae_config_class_for_architecture(architecture).from_dict(config)
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
            if name == "threshold":
                parameter.abs_()
    return sae.eval()


def make_perfect_sae(site: str = "blocks.1.hook_resid_post", d_in: int = D_MODEL) -> Any:
    """Two features a direction, one each way: relu(x) - relu(-x) = x, so it explains all of any activation."""
    sae = make_sae("standard", d_in=d_in, d_sae=2 * d_in, hook_name=site)
    eye = torch.eye(d_in, dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return sae.to(dtype=torch.float32)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny model, a dictionary of it and a scope of it, each in a folder: what the shell and configs name."""
    root = tmp_path_factory.mktemp("workplace")
    model, tokenizer = make_hf(), make_tokenizer()
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    make_perfect_sae().save_model(root / "dictionary")
    lm = LM(model, tokenizer)
    scope = {
        "forget": [{"text": words(*range(i, i + 8))} for i in range(30, 40)],
        "near": [{"text": words(*range(i, i + 8))} for i in range(24, 28)],
        "retain": [{"text": words(*range(i, i + 8))} for i in range(7, 17)],
        "in_easy": _known(lm, range(30, 46)),
        "in_hard": _known(lm, range(31, 46), step=2),
        "out_near": _known(lm, range(20, 30)),
        "out_far": _known(lm, range(7, 20)),
    }
    (root / "scope").mkdir()
    for name, records in scope.items():
        (root / "scope" / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


PLANTED = (3, 5)
CONCEPT, NEAR, FAR = range(36, 46), range(26, 36), range(8, 26)


class Planted(NamedTuple):
    lm: LM
    scope: Scope
    first: str
    """Folder of a dictionary at resid_pre.0, in which the planted features are the concept."""
    second: str
    """Folder of one at resid_post.1."""


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """Feature 3 fires on the even words of the concept, feature 5 on the odd ones, and on nothing else."""
    root = tmp_path_factory.mktemp("planted")
    model = make_hf()
    with torch.no_grad():
        words_of = model.model.embed_tokens.weight
        words_of[:, PLANTED] = -words_of[:, PLANTED].abs()
        for parity, feature in enumerate(PLANTED):
            words_of[CONCEPT[parity::2], feature] *= -4
    for name, site in (("first", "blocks.0.hook_resid_pre"), ("second", "blocks.1.hook_resid_post")):
        make_perfect_sae(site).save_model(root / name)
    lm, generator = LM(model, make_tokenizer(), name="tiny"), torch.Generator().manual_seed(0)

    def draw(pool: range, n: int) -> list[str]:
        return [words(*(pool[i] for i in torch.randperm(len(pool), generator=generator)[:8])) for _ in range(n)]

    scope = Scope.of(
        "planted", forget=draw(CONCEPT, 24), near=draw(NEAR, 8), retain=draw(FAR, 24),
        in_easy=_known(lm, CONCEPT), in_hard=_known(lm, CONCEPT, step=2),
        out_near=_known(lm, NEAR), out_far=_known(lm, FAR),
    )  # fmt: skip
    return Planted(lm, scope, str(root / "first"), str(root / "second"))


@pytest.fixture(scope="session")
def codes(planted: Planted, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A codebook of the planted model, in a folder: a code for each word, which it writes wherever that word stands."""
    from concept_unlearn.dictionaries.codebook import Codebook

    eye, embedding = torch.eye(D_MODEL), planted.lm.model.model.embed_tokens.weight.detach()
    site = Site("resid_pre", 0)
    codebook = Codebook(site=site, d_in=D_MODEL, d_code=2 * D_MODEL, sizes=(VOCAB,), n_active=1)
    codebook.load_state_dict({
        "W_enc": torch.cat([eye, -eye], 1), "b_enc": torch.zeros(2 * D_MODEL), "b_dec": torch.zeros(D_MODEL),
        "codes": torch.cat([embedding, -embedding], 1).relu(), "W_dec": torch.cat([eye, -eye], 0),
    })  # fmt: skip
    assert torch.allclose(codebook(embedding), embedding, atol=1e-3)
    folder = tmp_path_factory.mktemp("codebook")
    codebook.save(folder)
    return str(folder)


def _known(lm: LM, starts: range, step: int = 1) -> list[dict[str, Any]]:
    """Probes that the model answers, because the answers are what it says."""
    prompts = [words(i, 7 + (i * step) % 40, i - step) for i in starts]
    said = lm.generate(prompts, max_new_tokens=1, chat=False)
    found = [{"prompt": p, "answers": [s], "distractors": ["w46", "w47"]} for p, s in zip(prompts, said, strict=True)]
    return [f for f in found if f["answers"][0].startswith("w")]
