"""Labels come from the endpoint, nothing is asked twice, and what goes wrong there is said."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import CONCEPT, PLANTED, make_perfect_sae

from concept_unlearn.component import build
from concept_unlearn.dictionaries import SAEDictionary, load_dictionary
from concept_unlearn.errors import EndpointFailed, InvalidConfig
from concept_unlearn.features import Inspection, Labeller, inspect_features
from concept_unlearn.features.show.inspection import Context

EVEN, ODD = PLANTED


class Endpoint:
    """What was asked, and what is said to each question: (status, body) or a text, which becomes a message."""

    def __init__(self, *answers, headers=()):
        self.answers, self.asked, self.keys, self.paths = list(answers), [], [], []
        self.headers = dict(headers)

    def reply(self):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, tuple):
            return answer
        return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]})


@contextmanager
def serving(endpoint):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            endpoint.keys.append(self.headers.get("Authorization"))
            self.send_error(405)

        def do_POST(self):
            endpoint.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            endpoint.keys.append(self.headers.get("Authorization"))
            endpoint.paths.append(self.path)
            status, body = endpoint.reply()
            if status is None:  # hang up
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in endpoint.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def seen(planted):
    return inspect_features(
        planted.lm, load_dictionary(planted.first), planted.scope, [EVEN, ODD], contexts=2, window=3
    )


@pytest.fixture
def ask(tmp_path):
    def ask(endpoint, seen, **settings):
        with serving(endpoint) as url:
            settings = {"url": url, "model": "tiny", "cache": tmp_path / "labels", "pause": 0.0} | settings
            return Labeller(**settings)(seen)

    return ask


def test_each_feature_is_shown_where_it_fires_and_gets_what_is_said(seen, ask):
    endpoint = Endpoint("even words", "odd words")
    made = ask(endpoint, seen)
    assert [s.label for s in made.features] == ["even words", "odd words"]
    assert made.labeller == "tiny"
    assert made.beside({}).features == made.features
    assert endpoint.paths == ["/v1/chat/completions"] * 2
    assert [q["model"] for q in endpoint.asked] == ["tiny", "tiny"]
    shown = endpoint.asked[0]["messages"][-1]["content"]
    marked = {piece.partition("»")[0].strip() for piece in shown.split("«")[1:]}
    assert {word for run in marked for word in run.split()} <= {f"w{i}" for i in CONCEPT[0::2]}
    assert Inspection.model_validate_json(made.model_dump_json()) == made
    assert "even words" in made.html()


def test_nothing_is_asked_twice_and_another_question_is(seen, ask):
    with serving(Endpoint("first")) as url:
        first = ask(Endpoint("unused"), seen, url=url)
    silent = Endpoint((500, "must not be asked"))
    with serving(silent) as _:
        assert ask(silent, seen, url=url, tries=1) == first
    assert silent.asked == []
    with serving(endpoint := Endpoint("second")) as other:
        ask(endpoint, seen, url=other)
        ask(endpoint, seen, url=other, settings={"temperature": 1})
        ask(endpoint, seen, url=other, model="big")
        ask(endpoint, seen, url=other, contexts=1)
    assert len(endpoint.asked) == 4 * len(seen.features)


@pytest.mark.parametrize("passing", [(429, "slow down"), (503, "loading"), (None, "")])
def test_a_busy_or_broken_off_answer_is_asked_for_again(seen, ask, passing):
    endpoint = Endpoint(passing, passing, "a label")
    assert [s.label for s in ask(endpoint, seen, tries=3).features] == ["a label", "a label"]
    assert len(endpoint.asked) == 4


def test_it_waits_as_long_as_it_is_told(seen, ask, monkeypatch):
    slept = []
    monkeypatch.setattr("concept_unlearn.endpoint.time.sleep", slept.append)
    ask(Endpoint((429, ""), "a label", headers={"Retry-After": "7"}), seen, pause=1.0)
    ask(Endpoint((503, ""), (503, ""), (503, ""), "a label"), seen, pause=1.0, model="other")
    assert slept == [7, 1, 2, 4]


def test_what_was_labelled_before_a_failure_is_kept(seen, ask):
    with serving(endpoint := Endpoint("first", (401, "no such key"))) as url:
        with pytest.raises(EndpointFailed, match=r"refused \(401 .*no such key"):
            ask(endpoint, seen, url=url)
        assert len(endpoint.asked) == 2  # one that refuses is asked once
        endpoint.answers = ["second"]
        assert [s.label for s in ask(endpoint, seen, url=url).features] == ["first", "second"]
        assert len(endpoint.asked) == 3


@pytest.mark.parametrize(
    ("said", "label"),
    [
        ('"Chess openings."\n', "Chess openings"),
        ("<think>\nIt is chess.\n</think>\n\n**names of moves**", "names of moves"),
        ("\n\nfirst line\nsecond line", "first line"),
        ("шахматы </script>", "шахматы </script>"),
        ("x" * 500, "x" * 120),
    ],
)
def test_a_label_is_one_line_without_quotes_or_reasoning(seen, ask, said, label):
    assert ask(Endpoint(said), seen).features[0].label == label


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ((200, "<html>"), "not JSON"),
        ((200, '{"choices": []}'), "something else than a message"),
        ((200, "[]"), "something else than a message"),
        ((200, '{"choices": [{"message": {"content": null}}]}'), "something else than a message"),
        ("  ", "with no word"),
        ("<think>for ever", "with no word"),
        ((404, "no model tiny"), "404 .*no model tiny"),
        ((500, "broken"), "500 .*broken"),
        ((None, ""), "cannot be reached"),
    ],
)
def test_an_answer_that_is_no_label_is_said(seen, ask, answer, match):
    with pytest.raises(EndpointFailed, match=match):
        ask(Endpoint(answer), seen, tries=2)


def test_a_silent_and_an_absent_endpoint_are_said(seen, ask):
    with serving(Endpoint("unused")) as gone:
        pass
    with pytest.raises(EndpointFailed, match="cannot be reached"):
        ask(Endpoint(""), seen, url=gone, tries=2)


def test_the_key_is_sent_and_kept_nowhere(seen, ask, tmp_path, monkeypatch):
    monkeypatch.setenv("OWN_KEY", "s3cret")
    endpoint = Endpoint("a label")
    made = ask(endpoint, seen, key_env="OWN_KEY")
    assert endpoint.keys == ["Bearer s3cret"] * 2
    made.save(tmp_path / "seen")
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]
    ask(other := Endpoint("a label"), seen, model="other")
    assert other.keys == [None, None]
    monkeypatch.delenv("OWN_KEY")
    with pytest.raises(InvalidConfig, match=r"should be in \$OWN_KEY"):
        ask(endpoint, seen, key_env="OWN_KEY")


def test_nobody_is_sent_elsewhere_with_the_key(seen, ask, monkeypatch):
    monkeypatch.setenv("A_KEY", "secret")
    with serving(other := Endpoint("a label")) as url:
        moved = Endpoint((302, ""), headers={"Location": url.replace("127.0.0.1", "localhost")})
        with pytest.raises(EndpointFailed, match=r"refused \(302"):
            ask(moved, seen, key_env="A_KEY", tries=1)
    assert (moved.keys, other.keys) == (["Bearer secret"], [])


def test_a_feature_that_never_fires_is_not_asked_about(planted, ask):
    sae = make_perfect_sae("blocks.0.hook_resid_pre")
    with torch.no_grad():
        sae.b_enc[2] = -1e6
    seen = inspect_features(planted.lm, SAEDictionary(sae), planted.scope, [2, EVEN])
    endpoint = Endpoint("even words")
    assert [s.label for s in ask(endpoint, seen).features] == [None, "even words"]
    assert len(endpoint.asked) == 1


def test_weak_tokens_are_not_marked(seen, ask):
    context = Context(part="forget", passage=0, position=1, peak=1, tokens=(" a", " b", " c"), acts=(0.1, 9.0, 4.0))
    shown = seen.features[0]
    shown = shown.model_copy(update={"forget": shown.forget.model_copy(update={"contexts": (context,)})})
    endpoint = Endpoint("a label")
    ask(endpoint, seen.model_copy(update={"features": (shown,)}))
    assert "a« b c»" in endpoint.asked[0]["messages"][-1]["content"]


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "https://", ""])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InvalidConfig, match="begins with http"):
        build(Labeller, {"url": url, "model": "tiny"})


def test_an_address_is_the_same_with_and_without_what_is_asked_there():
    given = ("http://h/v1", "http://h/v1/", "http://h/v1/chat/completions")
    assert {Labeller(url=url, model="tiny").url for url in given} == {"http://h/v1"}
