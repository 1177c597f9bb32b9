"""Backends: an endpoint that misbehaves in every way, and two local models that agree."""

import collections
import json
import shutil
import sys
import threading

import pytest
from server import completion, half, hang, hang_up, send, serve, status

from medvlp_jax.config import UserError
from medvlp_jax.evidence import backends
from medvlp_jax.evidence.endpoint import endpoint
from medvlp_jax.evidence.protocol import Reply, Request

ASKED = [Request(str(i), f"prompt {i}", f"text {i}") for i in range(12)]


def ask(url, requests=ASKED, check=json.loads, **settings):
    """Return {key: reply} and the pauses that were made."""
    pauses = []
    settings = {"in_flight": 4, "timeout": 5.0, "sleep": pauses.append, **settings}
    backend = endpoint(url, "m", **settings)
    return {reply.key: reply for reply in backend.complete(requests, check)}, pauses


def test_every_request_is_answered_once_and_some_at_the_same_time():
    with serve(lambda n, prompt: json.dumps(prompt)) as server:
        replies, pauses = ask(server.url)
    assert replies == {r.key: Reply(r.key, json.dumps(r.prompt)) for r in ASKED}
    assert sorted(server.prompts) == sorted(r.prompt for r in ASKED)
    assert not pauses


def test_as_many_requests_are_in_flight_as_allowed_and_no_more():
    together = threading.Barrier(3, timeout=60)

    def behave(number, prompt):
        if number <= 3:  # none of the first three is answered before the third is here
            together.wait()
        return "1"

    with serve(behave) as server:
        ask(server.url, in_flight=3)
    assert server.most == 3


@pytest.mark.parametrize(
    "trouble",
    [status(500), status(429), status(503), hang_up, half, lambda h: send(h, b"<html>busy</html>"),
     lambda h: send(h, {"choices": []}), lambda h: send(h, completion(None)),
     lambda h: send(h, b"[" * 100_000)],
    ids=["500", "429", "503", "hang up", "half a body", "html", "no choices", "no content", "deep"],
)  # fmt: skip
def test_what_may_pass_is_tried_again_with_growing_pauses(trouble):
    with serve(lambda n, prompt: trouble if n <= 3 else "1") as server:
        replies, pauses = ask(server.url, ASKED[:1], first_pause=1.0)
    assert replies["0"] == Reply("0", "1")
    assert len(pauses) == 3
    # Attempt k pauses between 2^k / 2 and 2^k seconds.
    for k, pause in enumerate(pauses):
        assert 2**k / 2 <= pause <= 2**k


def test_a_server_that_says_when_to_come_back_is_obeyed():
    with serve(lambda n, prompt: status(429, Retry_After="17") if n == 1 else "1") as server:
        _, pauses = ask(server.url, ASKED[:1])
    assert pauses == [17.0]


def test_a_request_without_an_answer_in_time_is_tried_again():
    with serve(lambda n, prompt: hang(1.0) if n == 1 else "1") as server:
        replies, pauses = ask(server.url, ASKED[:1], timeout=0.2)
    assert replies["0"].answer == "1"
    assert len(pauses) == 1


def test_an_answer_in_prose_is_tried_twice_and_recorded():
    with serve(lambda n, prompt: "I would say so." if prompt == "prompt 1" else "1") as server:
        replies, _ = ask(server.url, ASKED[:3])
    assert replies["1"] == Reply("1", error="malformed answer")
    assert server.prompts.count("prompt 1") == 2
    assert replies["0"].answer == replies["2"].answer == "1"


@pytest.mark.parametrize(
    "refuse",
    [lambda h: send(h, completion("no", refusal="I cannot")), status(400),
     lambda h: send(h, {"choices": [{"message": {"content": "x"},
                                     "finish_reason": "content_filter"}]})],
    ids=["refusal", "400", "filter"],
)  # fmt: skip
def test_a_refusal_is_recorded_and_not_asked_again(refuse):
    with serve(lambda n, prompt: refuse) as server:
        replies, pauses = ask(server.url, ASKED[:1])
    assert replies["0"].error.startswith("refused")
    assert len(server.prompts) == 1
    assert not pauses


@pytest.mark.parametrize("text", [None, "", "<think>Let me see", '{"evid'])
def test_an_answer_whose_tokens_are_used_up_is_recorded_and_not_asked_again(text):
    cut = lambda h: send(h, completion(text, end="length"))
    with serve(lambda n, prompt: cut) as server:
        replies, pauses = ask(server.url, ASKED[:1], max_tokens=7)
    assert replies["0"] == Reply("0", error="cut off: no answer within max_tokens=7")
    assert len(server.prompts) == 1
    assert not pauses


def test_what_was_cut_off_and_can_be_read_is_an_answer():
    with serve(lambda n, prompt: lambda h: send(h, completion("1", end="length"))) as server:
        assert ask(server.url, ASKED[:1])[0] == {"0": Reply("0", "1")}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"error": {"message": "no 'prompt 0'", "type": "invalid_request_error",
                    "code": "unknown", "param": "messages[0].role"}},
         " (type invalid_request_error, code unknown, param messages[0].role)"),
        ({"object": "error", "message": "no 'prompt 0'", "type": "BadRequestError", "param": None,
          "code": 400}, " (type BadRequestError, code 400)"),
        ({"error": {"type": "what 'prompt 0' is", "param": ["prompt 0"]}}, ""),
        (b"prompt 0", ""),
        ([], ""),
    ],
)  # fmt: skip
def test_a_refusal_says_the_names_the_server_gives_and_never_its_sentence(body, reason):
    with serve(lambda n, prompt: lambda h: send(h, body, 400)) as server:
        replies, _ = ask(server.url, ASKED[:1])
    assert replies["0"].error == f"refused: HTTP 400{reason}"


def test_more_fields_reach_the_endpoint_and_are_part_of_who_answers():
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "temperature": None}
    with serve(lambda n, prompt: "1") as server:
        ask(server.url, ASKED[:1], extra_body=extra, max_tokens=9)
    messages = [{"role": "user", "content": "prompt 0"}]
    assert server.body == {
        "model": "m", "messages": messages, "max_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": False},
    }  # fmt: skip
    settings = endpoint("http://localhost/v1", "m", extra_body=extra, max_tokens=9).settings
    assert settings == {"max_tokens": 9, "extra_body": extra}
    with pytest.raises(UserError, match="--extra-body sets 'stream'"):
        endpoint("http://localhost/v1", "m", extra_body={"stream": True})


def test_nobody_is_asked_any_more_once_the_run_has_stopped():
    behave = lambda n, prompt: "1" if prompt == "prompt 0" else status(503, Retry_After="60")
    with serve(behave) as server:
        replies = endpoint(server.url, "m", in_flight=4).complete(ASKED[:4], json.loads)
        assert next(replies) == Reply("0", "1")
        replies.close()
        for thread in threading.enumerate():
            if thread.name.startswith("endpoint"):
                thread.join(30)
                assert not thread.is_alive()
        assert max(collections.Counter(server.prompts).values()) == 1


@pytest.mark.parametrize("code", [401, 404])
def test_an_unknown_key_or_model_stops_with_a_sentence(code):
    with serve(lambda n, prompt: status(code)) as server, pytest.raises(UserError, match="'m'"):
        ask(server.url)


def test_an_endpoint_that_dies_half_way_stops_the_run_and_what_it_answered_is_there():
    taken = []
    with serve(lambda n, prompt: "1" if n <= 5 else hang_up) as server:
        backend = endpoint(
            server.url, "m", in_flight=1, attempts=2, patience=3, sleep=lambda seconds: None
        )
        with pytest.raises(UserError, match="does not answer any more"):
            collections.deque(map(taken.append, backend.complete(ASKED, json.loads)))
    assert [reply.answer for reply in taken] == ["1"] * 5 + [""] * 3
    assert len(server.prompts) == 5 + 3 * 2


@pytest.mark.parametrize("code", [429, 503])
def test_an_endpoint_that_only_says_later_counts_as_dead_too(code):
    """A dead server behind a proxy: asking each of 200,000 reports six times takes days."""
    taken = []
    with serve(lambda n, prompt: "1" if n <= 5 else status(code)) as server:
        backend = endpoint(
            server.url, "m", in_flight=1, attempts=2, patience=3, sleep=lambda seconds: None
        )
        with pytest.raises(UserError, match=f"does not answer any more .*{code}"):
            collections.deque(map(taken.append, backend.complete(ASKED, json.loads)))
    assert len(taken) == 5 + 3


def test_the_key_comes_from_the_environment_and_is_in_no_message(monkeypatch):
    monkeypatch.setenv("MEDVLP_API_KEY", "secret-7")
    with serve(lambda n, prompt: "1") as server:
        ask(server.url, ASKED[:1])
    assert server.headers["Authorization"] == "Bearer secret-7"
    with serve(lambda n, prompt: status(401)) as server, pytest.raises(UserError) as refused:
        ask(server.url, ASKED[:1])
    assert "secret-7" not in str(refused.value)


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_neither_texts_nor_the_key_follow_a_redirection(monkeypatch, code):
    monkeypatch.setenv("MEDVLP_API_KEY", "secret-7")
    with serve(lambda n, prompt: "1") as other:
        place = f"{other.url}/chat/completions"
        asked = []
        monkeypatch.setattr(other, "verify_request", lambda *_: asked.append(1) or True)
        with (
            serve(lambda n, prompt: status(code, Location=place)) as server,
            pytest.raises(UserError, match=f"answers {code}: it redirects to '{other.url}'"),
        ):
            ask(server.url, ASKED[:1])
    assert not asked


@pytest.mark.parametrize("url", ["https://api.vendor.com/v1", "http://10.0.0.7:8000/v1"])
def test_reports_go_to_another_machine_only_when_asked(url):
    with pytest.raises(UserError, match="--allow-remote"):
        backends.check_remote(url, allow_remote=False, sent="reports are patients' data")
    backends.check_remote(url, allow_remote=True, sent="")


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "http://127.0.0.1/v1", "http://[::1]:80/v1"]
)
def test_this_machine_is_not_another(url):
    backends.check_remote(url, allow_remote=False, sent="")


def test_what_is_for_this_machine_takes_no_way_over_a_proxy(monkeypatch):
    with serve(lambda n, prompt: "2") as proxy, serve(lambda n, prompt: "1") as server:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        replies, _ = ask(server.url, ASKED[:1])
    assert [reply.answer for reply in replies.values()] == ["1"]
    assert not proxy.prompts


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UserError, match="--url"):
        backends.check_remote("localhost:8000", allow_remote=True, sent="")


def test_an_unknown_backend_or_a_missing_model_is_named():
    with pytest.raises(UserError, match="rules"):
        backends.make("rule", writers={"rules": str}, sent="")
    with pytest.raises(UserError, match="--model"):
        backends.make("qwen3", writers={"rules": str}, sent="")
    with pytest.raises(UserError, match="--extra-body goes with --backend endpoint"):
        backends.make("qwen3", writers={}, sent="", model="m", extra_body={"top_k": 1})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Return a folder with a random Qwen3ForCausalLM and a tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("qwen3")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(["the lungs are clear"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=words.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.5,
        eos_token_id=2,
        bos_token_id=None,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.mark.hf
@pytest.mark.slow
def test_our_qwen3_answers_as_transformers_does_whatever_the_batch(tiny):
    asked = [Request(str(i), "the lungs " * (1 + 3 * i), "") for i in range(5)]
    answers = {}
    for name, backend in {
        "torch": backends.transformers(tiny, batch=2, max_tokens=12),
        "ours": backends.qwen3(tiny, batch=2, max_tokens=12),
        "ours, all at once": backends.qwen3(tiny, batch=8, max_tokens=12),
    }.items():
        answers[name] = [r.answer for r in backend.complete(asked, lambda answer: None)]
    assert answers["torch"] == answers["ours"] == answers["ours, all at once"]
    assert len(set(answers["ours"])) > 1
    assert all(answers["ours"])


@pytest.fixture
def generated(monkeypatch):
    """Return what local PyTorch models are asked to go on from: their answer is that."""
    from transformers import Qwen3ForCausalLM

    asked = []

    def generate(model, input_ids, **_):
        asked.extend(input_ids.tolist())
        return input_ids

    monkeypatch.setattr(Qwen3ForCausalLM, "generate", generate)
    return asked


@pytest.mark.hf
def test_a_template_writes_the_special_tokens_itself_and_is_told_not_to_think(
    tiny, tmp_path, generated
):
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = shutil.copytree(tiny, tmp_path / "model")
    fast = AutoTokenizer.from_pretrained(tiny)
    fast.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    first = fast("lungs").input_ids
    assert first[0] == 0
    for template, expected in (
        ("<|endoftext|>{{ messages[0].content }}{{ enable_thinking }}", "lungsFalse"),
        (None, "lungs"),
    ):
        fast.chat_template = template
        fast.save_pretrained(folder)
        if template is None:
            (folder / "chat_template.jinja").unlink(missing_ok=True)
        backend = backends.transformers(str(folder), batch=1)
        list(backend.complete([Request("x", "lungs", "")], lambda answer: None))
        assert generated.pop() == [0, *fast(expected, add_special_tokens=False).input_ids]


@pytest.mark.hf
def test_a_local_pytorch_model_goes_to_the_gpu_where_there_is_one(tiny, generated, monkeypatch):
    import torch

    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.nn.Module, "to", lambda self, *where, **_: moved.extend(where) or self
    )
    backends.transformers(tiny)
    assert moved[-1:] == ["cuda"]


@pytest.mark.slow
def test_a_local_model_that_babbles_is_recorded_and_a_long_prompt_is_refused(tiny):
    backend = backends.qwen3(tiny, batch=2, max_tokens=4)
    replies = list(backend.complete(ASKED[:3], json.loads))
    assert [r.error for r in replies] == ["malformed answer"] * 3
    with pytest.raises(UserError, match="512"):
        list(backend.complete([Request("x", "lungs " * 600, "")], json.loads))


def test_a_local_model_needs_its_folder_and_pytorch(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--model=Qwen/Qwen3-0\.6B is no folder"):
        backends.qwen3("Qwen/Qwen3-0.6B")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        backends.transformers(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="needs PyTorch"):
        backends.transformers(str(tmp_path))
