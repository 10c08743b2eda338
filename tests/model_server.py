"""An OpenAI-compatible server that really generates, with transformers, from a folder on this machine.

    python -m tests.model_server --model FOLDER --port 8000 [--log FILE] [--max-context N]

/v1/models and /v1/chat/completions. A JSON schema is obeyed as vLLM and llama.cpp do it: the model chooses among what
the schema allows at each point. Without one, it says what it likes. One line per finished answer goes to the log.
"""

import argparse
import hashlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Generator:
    """A causal language model that continues a prompt, freely or within a schema."""

    def __init__(self, folder: str, max_context: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.torch, self.max_context = torch, max_context
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
        self.lock = threading.Lock()

    def answer(
        self, messages: list[dict[str, str]], schema: dict[str, Any] | None, max_tokens: int
    ) -> tuple[str, str, int]:
        """Text, finish reason, tokens of the prompt."""
        if self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        else:
            ids = self.tokenizer.encode("\n".join(m["content"] for m in messages) + "\n")
        with self.lock, self.torch.no_grad():
            state = _State(self, ids[-self.max_context :])
            if schema is None:
                text, finish = state.free(max_tokens)
            else:
                state.value(schema)
                text, finish = state.text, "stop"
        return text, finish, len(ids)


class _State:
    """A text under way, with the model's cache."""

    def __init__(self, generator: Generator, ids: list[int]) -> None:
        self.g, self.text, self.past = generator, "", None
        self._feed(ids)

    def _feed(self, ids: list[int]) -> None:
        out = self.g.model(self.g.torch.tensor([ids]), past_key_values=self.past, use_cache=True)
        self.past, self.logits = out.past_key_values, out.logits[0, -1].float()

    def say(self, text: str) -> None:
        self.text += text
        self._feed(self.g.tokenizer.encode(text, add_special_tokens=False))

    def choose(self, options: list[str]) -> None:
        """The option whose first token the model prefers."""
        first = [self.g.tokenizer.encode(option, add_special_tokens=False)[0] for option in options]
        self.say(options[int(self.logits[first].argmax())])

    def free(self, max_tokens: int, stop: str = "") -> tuple[str, str]:
        ids: list[int] = []
        for _ in range(max_tokens):
            token = int(self.logits.argmax())
            if token == self.g.tokenizer.eos_token_id:
                return self.g.tokenizer.decode(ids), "stop"
            ids.append(token)
            text = self.g.tokenizer.decode(ids)
            if stop and stop in text:
                return text[: text.index(stop)], "stop"
            self._feed([token])
        return self.g.tokenizer.decode(ids), "length"

    def value(self, schema: dict[str, Any]) -> None:
        kind = schema["type"]
        if kind == "object":
            self.say("{")
            for i, (name, inner) in enumerate(schema["properties"].items()):
                self.say(("" if i == 0 else ", ") + json.dumps(name) + ": ")
                self.value(inner)
            self.say("}")
        elif kind == "array":
            self.say("[")
            for i in range(schema["minItems"]):
                if i:
                    self.say(", ")
                self.value(schema["items"])
            self.say("]")
        elif kind == "integer":
            self.choose([str(option) for option in schema["enum"]])
        elif kind == "boolean":
            self.choose(["true", "false"])
        elif kind == "string":
            self.say('"')
            words = self.free(24, stop='"')[0].replace("\\", " ").replace('"', " ").replace("\n", " ")
            self.text += json.dumps(words[: schema["maxLength"]], ensure_ascii=False)[1:-1] + '"'
        else:
            raise ValueError(kind)


class ModelServer:
    """Serves a generator on 127.0.0.1 until closed."""

    def __init__(self, generator: Generator, port: int = 0, log: str | None = None, delay_s: float = 0.0) -> None:
        self.asked: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(200, {"object": "list", "data": [{"id": "local", "object": "model"}]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                key = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
                form = body.get("response_format", {})
                schema = form["json_schema"]["schema"] if form.get("type") == "json_schema" else None
                time.sleep(delay_s)
                text, finish, n_prompt = generator.answer(body["messages"], schema, body["max_tokens"])
                n_answer = len(generator.tokenizer.encode(text))
                server.asked.append(key)
                choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
                usage = {"prompt_tokens": n_prompt, "completion_tokens": n_answer, "total_tokens": n_prompt + n_answer}
                self.reply(200, {"object": "chat.completion", "choices": [choice], "usage": usage})
                if log is not None:  # one write: a line is whole or not there
                    with open(log, "a", encoding="utf-8") as file:
                        file.write(f"{key}\n")

            def reply(self, status: int, body: dict[str, Any]) -> None:
                content = json.dumps(body).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    self.close_connection = True  # the client is gone

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--log")
    parser.add_argument("--max-context", type=int, default=2048)
    parser.add_argument("--delay-s", type=float, default=0.0)
    arguments = parser.parse_args()
    server = ModelServer(
        Generator(arguments.model, arguments.max_context), arguments.port, arguments.log, arguments.delay_s
    )
    print(f"serving at {server.base_url}", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
