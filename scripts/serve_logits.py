"""A model behind an address, for ``concept_unlearn.lm.remote``: the least of OpenAI's /v1/completions that it asks.

python scripts/serve_logits.py smollm2 --port 8000
"""

from __future__ import annotations

import argparse
import base64
import json
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch

from concept_unlearn.lm import LM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    server = make_server(LM.load(options.model), options.port)
    print(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def make_server(lm: LM, port: int = 0, *, full: bool = True) -> HTTPServer:
    """``full=False`` answers as OpenAI's format has it, without the short way for a whole vocabulary."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            choices = []
            for index, row in enumerate(question["prompt"]):
                with torch.no_grad():
                    said = lm.logits(torch.tensor([row], device=lm.device))[0].float().log_softmax(-1).cpu()
                said = said if question["echo"] else said[-1:]
                if full and question.get("full_logprobs"):
                    logprobs = {"full": base64.b64encode(said.numpy().astype("<f4").tobytes()).decode()}
                else:
                    tops = [top(row, question["logprobs"]) for row in said]
                    logprobs = {"top_logprobs": [None, *tops] if question["echo"] else tops}
                choices.append({"index": index, "text": "", "logprobs": logprobs})
            content = json.dumps({"model": question["model"], "choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    return HTTPServer(("127.0.0.1", port), Handler)


def top(logprobs: torch.Tensor, n: int) -> dict[str, float]:
    values, ids = logprobs.topk(min(n, len(logprobs)))
    return {f"token_id:{i}": value for i, value in zip(ids.tolist(), values.tolist(), strict=True)}


if __name__ == "__main__":
    main()
