"""A model behind an address: what it says is what it says in this process, and failures are told as such."""

from __future__ import annotations

import importlib.util
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_hf, make_tokenizer, words

from concept_unlearn.errors import EndpointFailed
from concept_unlearn.lm import LM
from concept_unlearn.lm.head import LogitsOnly, ending
from concept_unlearn.lm.remote import RemoteLogits
from concept_unlearn.patches import LogitPatch
from concept_unlearn.weights import Dense

PROMPTS = [words(7, 8, 9, 10), words(11, 12)]


def load_script(name):
    path = Path(__file__).parents[2] / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(server):
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def answering(content, *, status=200, wait=0.0):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(wait)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_): ...

    with serving(HTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def remote(url, **settings):
    return LM(RemoteLogits(url, "tiny", vocabulary=VOCAB, end_id=1, **settings), make_tokenizer(), name="remote")


@pytest.fixture(params=[True, False], ids=["full", "openai"])
def far(request, lm):
    with serving(load_script("serve_logits").make_server(lm, full=request.param)) as url:
        yield remote(url)


def test_it_says_what_the_model_says_up_to_a_constant(lm, far, ids):
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, :3] = False
    want = lm.logits(ids, mask).log_softmax(-1)
    torch.testing.assert_close(far.logits(ids, mask)[mask], want[mask], rtol=1e-4, atol=1e-4)


def test_it_is_scored_and_continued_like_the_model(lm, far):
    assert far.generate(PROMPTS, max_new_tokens=6, chat=False) == lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    prompts, answers = [[7, 8, 9], [10, 11]], [[[4, 5, 6], [7]], [[20, 21]]]
    for one, want in zip(far.score(prompts, answers), lm.score(prompts, answers), strict=True):
        for a, b in zip(one, want, strict=True):
            torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-4, atol=1e-4)


def test_an_offset_beside_it_is_an_offset_beside_the_model(lm, far):
    small = LM(make_hf("gpt2", seed=5), make_tokenizer(), name="small")
    patch = LogitPatch({n: Dense(torch.full_like(p, 0.1)) for n, p in small.model.named_parameters()}, small)
    with patch.on(lm):
        want = lm.generate(PROMPTS, max_new_tokens=6, chat=False)
    with patch.on(far):
        assert far.generate(PROMPTS, max_new_tokens=6, chat=False) == want
        assert far.generate(PROMPTS, max_new_tokens=6, chat=False, use_cache=False) == want
    assert want != lm.generate(PROMPTS, max_new_tokens=6, chat=False)


def test_it_ends_in_its_logits_and_its_name_is_its_fingerprint(lm):
    assert isinstance(ending(remote("http://a").model), LogitsOnly)
    assert remote("http://a").fingerprint != remote("http://b").fingerprint


@pytest.mark.parametrize(
    ("content", "settings", "said"),
    [
        (b"<html>", {}, "not JSON: b'<html>'"),
        (b'{"choices": []}', {}, "something else than log-probabilities of 1 prompts"),
        (b'{"error": "no"}', {}, "something else than log-probabilities"),
        (b"no such model", {"status": 404}, r"refused \(404 Not Found\): no such model"),
        (b"{}", {"wait": 0.5}, r"did not answer within 0\.1 s: give timeout="),
        (
            json.dumps({"choices": [{"logprobs": {"top_logprobs": [None, *[{"token_id:3": -0.1}] * 2]}}]}).encode(),
            {},
            f"gave 1 of {VOCAB} log-probabilities: .*max-logprobs",
        ),
        (
            json.dumps({"choices": [{"logprobs": {"top_logprobs": [None, *[{" the": -0.1}] * 2]}}]}).encode(),
            {},
            "something else than log-probabilities",
        ),
    ],
    ids=["html", "empty", "error", "refused", "late", "top", "words"],
)
def test_an_answer_of_no_use_is_told_as_such(content, settings, said):
    with answering(content, **settings) as url, pytest.raises(EndpointFailed, match=said):
        remote(url, timeout=0.1 if "wait" in settings else 60.0).logits(torch.tensor([[7, 8]]))


def test_an_address_where_nobody_listens_is_told():
    with pytest.raises(EndpointFailed, match="cannot be reached"):
        remote("http://127.0.0.1:9").logits(torch.tensor([[7, 8]]))
