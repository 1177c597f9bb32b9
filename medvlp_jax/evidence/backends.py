"""Who answers a prompt: a writer, an HTTP endpoint, a local PyTorch model, or our Qwen3 under jit.

A backend takes requests one by one and yields replies in any order; what it is asked and how the
answer is read is its caller's. Greedy everywhere: the same prompt gets the same answer.
"""

from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from medvlp_jax.config import UserError, nearest
from medvlp_jax.evidence import endpoint
from medvlp_jax.evidence.protocol import Backend, Reply

MODELS = ("endpoint", "transformers", "qwen3")


def check_remote(url: str, *, allow_remote: bool, sent: str) -> None:
    """Refuse to send texts to another machine unless that was asked for.

    Args:
      url: of the endpoint.
      allow_remote: whether it was.
      sent: what would be sent and why that is no matter of course, for the message.

    Raises:
      UserError: naming the host, and why.
    """
    host = urlsplit(url).hostname
    if not host or urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"--url must be http://HOST[:PORT]/v1 or https://..., got '{url}'.")
    if allow_remote or endpoint.is_this_machine(host):
        return
    raise UserError(
        f"{host} is another machine, and {sent}: they are not sent there unless you add "
        "--allow-remote, which is yours to decide under the data's terms of use."
    )


def writer(name: str, write: Callable[[str], str]) -> Backend:
    """Return a backend that computes its answer from the text: `rules`, or a template."""

    def complete(requests, check):
        return (Reply(request.key, write(request.text)) for request in requests)

    return Backend(name, complete, counts_tokens=False)


def transformers(folder: str, *, batch: int = 4, max_tokens: int = 1024) -> Backend:
    """Return a local PyTorch language model from a Hugging Face folder, greedy.

    Args:
      folder: with config.json, *.safetensors and a tokenizer.
      batch: prompts at once, padded on the left.
      max_tokens: of an answer.

    Raises:
      UserError: for no such folder, or where PyTorch is not installed.
    """
    if not (Path(folder) / "config.json").is_file():
        raise UserError(
            f"--model={folder} holds no config.json; accepted is a folder of Hugging Face's."
        )
    try:
        import torch
    except ModuleNotFoundError:
        raise UserError(
            "--backend transformers needs PyTorch, which this installation does not have: "
            "`pip install torch`, or take --backend qwen3."
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    has_template = bool(tokenizer.chat_template)

    def asked(prompt):
        if not has_template:
            return prompt
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def answer(prompts):
        rows = tokenizer(
            [asked(p) for p in prompts],
            return_tensors="pt",
            padding=True,
            add_special_tokens=not has_template,  # a template writes them itself
        )
        rows = {name: rows[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            out = model.generate(
                **rows,
                do_sample=False,
                max_new_tokens=max_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        return tokenizer.batch_decode(
            out[:, rows["input_ids"].shape[1] :], skip_special_tokens=True
        )

    return _batched(f"transformers:{folder}", answer, batch, max_tokens)


def qwen3(folder: str, *, batch: int = 8, max_tokens: int = 1024, dtype: Any = None) -> Backend:
    """Return our Qwen3 from a Hugging Face folder, greedy, compiled once for each prompt length.

    Prompts are padded on the left to a power of two, so that few lengths are compiled.

    Args:
      folder: of a Qwen3ForCausalLM, with tokenizer.json.
      batch: prompts at once.
      max_tokens: of an answer.
      dtype: of the matrix products.

    Raises:
      UserError: for a folder of another model, or a prompt that is too long for it.
    """
    if not Path(folder).is_dir():
        raise UserError(
            f"--model={folder} is no folder; accepted is one of Hugging Face's, with config.json, "
            "*.safetensors and tokenizer.json."
        )
    import jax
    import numpy as np

    from medvlp_jax import convert
    from medvlp_jax.data import text
    from medvlp_jax.encoders import qwen3 as model
    from medvlp_jax.encoders.base import Tokens

    module, variables = convert.load(folder, dtype=dtype)
    if not isinstance(module, model.Qwen3) or not (module.is_tied or module.lm_head):
        raise UserError(f"{folder} is no Qwen3ForCausalLM; its module is {type(module).__name__}.")
    tokenizer = text.load_tokenizer(folder)
    variables = jax.device_put(variables)
    generate = jax.jit(lambda v, prompt: model.generate(module, v, prompt, steps=max_tokens))

    def answer(prompts):
        rows = [tokenizer.encode(chat(p), add_special_tokens=False).ids for p in prompts]
        length = 1 << (max(map(len, rows)) - 1).bit_length()
        length = min(length, module.max_length - max_tokens)
        if max(map(len, rows)) > length:
            raise UserError(
                f"A prompt of {max(map(len, rows))} tokens and {max_tokens} new ones do not fit "
                f"the {module.max_length} of {folder}."
            )
        rows += [rows[-1]] * (batch - len(rows))  # one shape for every batch
        ids = np.zeros((batch, length), np.int32)
        mask = np.zeros((batch, length), bool)
        for i, row in enumerate(rows):
            ids[i, length - len(row) :], mask[i, length - len(row) :] = row, True
        ids, mask = jax.device_get(generate(variables, Tokens(ids, mask)))
        return [tokenizer.decode(r[m].tolist()) for r, m in zip(ids, mask, strict=True)]

    return _batched(f"qwen3:{folder}", answer, batch, max_tokens)


def chat(prompt: str) -> str:
    """Wrap a prompt as one turn of Qwen's chat, thinking switched off."""
    opened = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    return f"<|im_start|>user\n{prompt}<|im_end|>\n{opened}"


def _batched(
    name: str, answer: Callable[[list[str]], list[str]], size: int, max_tokens: int
) -> Backend:
    def complete(requests, check):
        requests = iter(requests)
        while group := list(islice(requests, size)):
            answers = answer([request.prompt for request in group])
            for request, words in zip(group, answers, strict=False):
                yield Reply(request.key, words, _problem(words, check))

    return Backend(name, complete, settings={"max_tokens": max_tokens})


def _problem(answer: str, check: Callable[[str], Any]) -> str:
    try:
        check(answer)
    except ValueError:
        return "malformed answer"
    return ""


def make(name: str, *, writers: Mapping[str, Callable[[str], str]], sent: str, **options: Any):
    """Build a backend by name.

    Args:
      name: one of `writers` or of MODELS.
      writers: {name: what it answers to a text}, such as `rules`.
      sent: what goes to an endpoint, see `check_remote`.
      **options: model and max_tokens; for "endpoint" also url, allow_remote, in_flight, timeout and
        extra_body.

    Raises:
      UserError: for an unknown name, or options that are missing.
    """
    names = (*writers, *MODELS)
    if name not in names:
        raise UserError(f"No backend '{name}'. {nearest(name, names)}")
    if name in writers:
        return writer(name, writers[name])
    if not options.get("model"):
        raise UserError(f"--backend {name} needs --model: a name at the endpoint, or a folder.")
    if name == "endpoint":
        check_remote(options["url"], allow_remote=options["allow_remote"], sent=sent)
        names = ("in_flight", "timeout", "max_tokens", "extra_body")
        settings = {key: options[key] for key in names}
        return endpoint.endpoint(options["url"], options["model"], **settings)
    if options["extra_body"]:
        raise UserError(f"--extra-body goes with --backend endpoint, not with {name}.")
    local = {"transformers": transformers, "qwen3": qwen3}[name]
    return local(options["model"], max_tokens=options["max_tokens"])
