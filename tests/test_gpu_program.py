"""The counts of benchmarks/gpu_program.py on a program written by hand, and on a real one."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu_program
from medvlp_jax import train

PROGRAM = """HloModule step

%body (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  %sent = (f32[4]{0}, f32[4]{0}) collective-permute-start(%p)
  ROOT %got = f32[4]{0} collective-permute-done(%sent)
}

ENTRY %main (a: bf16[2,3], b: f32[3]) -> f32[2,3] {
  %a = bf16[2,3]{1,0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %fusion.1 = f32[2,3]{1,0} fusion(%a, %b), kind=kLoop, calls=%f, metadata={op_name="jit(step)/add"}
  %bitcast.1 = f32[6]{0} bitcast(%fusion.1)
  %input_transpose_fusion = f32[3,2]{1,0} fusion(%fusion.1), kind=kInput, calls=%g
  %custom-call.1 = (f32[2,3]{1,0}, s8[64]{0}) custom-call(%fusion.1, %bitcast.1), target="gemm"
  %all-reduce.1 = f32[2,3]{1,0} all-reduce(%fusion.1), to_apply=%sum
  %both = (f32[5]{0}, bf16[3]{0}) all-reduce-start(%b, %a), to_apply=%sum
  ROOT %fusion.2 = f32[2,3]{1,0} fusion(%input_transpose_fusion, %all-reduce.1), kind=kLoop
}
"""


def test_an_instruction_moves_what_it_reads_and_what_it_writes():
    rows = {row["name"]: row for row in gpu_program.traffic(PROGRAM)}
    assert {name: row["bytes"] for name, row in rows.items()} == {
        "fusion.1": 12 + 12 + 24,
        "input_transpose_fusion": 24 + 24,
        "custom-call.1": 24 + 24 + 24 + 64,
        "all-reduce.1": 24 + 24,
        "both": 12 + 12 + 20 + 6,
        "fusion.2": 24 + 24 + 24,
    }
    assert [name for name, row in rows.items() if row["library"]] == ["custom-call.1"]
    assert next(iter(rows)) == "custom-call.1"  # the largest
    assert (rows["fusion.1"]["makes"], rows["fusion.1"]["of"]) == ("f32[2,3]{1,0}", "jit(step)/add")


def test_what_devices_exchange_is_counted_once():
    assert gpu_program.exchanged(PROGRAM) == {
        "collective-permute f32": 16,
        "all-reduce f32": 24 + 20,
        "all-reduce bf16": 6,
    }


def test_the_entry_of_a_real_program_is_read():
    shape = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    program = jax.jit(lambda a: jnp.tanh(a @ a.T) + 1).lower(shape).compile().as_text()
    assert sum(row["bytes"] for row in gpu_program.traffic(program)) >= 4 * (64 * 32 + 64 * 64)


def has_a_compiler():
    plugins = importlib.util.find_spec("jax_plugins")
    return plugins is not None and importlib.util.find_spec("jax_plugins.xla_cuda13") is not None


@pytest.mark.skipif(has_a_compiler(), reason="there is a compiler for GPUs")
def test_without_the_plugin_it_says_what_to_install():
    with pytest.raises(SystemExit, match=r"pip install 'jax\[cuda13\]'"):
        gpu_program.main(["--config=configs/clip.py:demo"])


def test_what_is_traced_as_on_a_gpu_asks_for_cudnn():
    settings = "attention=cudnn", "remat=none"
    config, _ = train.resolve(
        [
            "--config=configs/clip.py:vit_b16",
            *(f"--config.recipe.image.{setting}" for setting in settings),
            "--config.recipe.image.variant=tiny",
            "--config.recipe.text.variant=tiny",
            "--config.train.batch_size=8",
        ]
    )
    with gpu_program.pretended():
        blueprint = gpu_program.plan.blueprint(config, jax.devices()[:1])
        traced = blueprint.step.trace(blueprint.state, blueprint.batch).jaxpr
    text = str(traced)
    assert "dot_product_attention_fwd" in text
    assert "layout_constraint" in text
    assert jax.default_backend() == "cpu"
