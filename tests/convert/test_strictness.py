"""Files that do not fit are refused, with all that is wrong in one sentence."""

import json
import math
import shlex
import subprocess

import huggingface_hub
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medvlp_jax import convert, sharding
from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures, checkpoint
from medvlp_jax.data import text
from medvlp_jax.encoders import bert, resnet, swin, vit
from medvlp_jax.encoders.base import Tokens

TOKENS = Tokens(np.ones((1, 2), np.int32), np.ones((1, 2), bool))


@pytest.fixture(scope="module")
def module():
    return bert.make("tiny", vocab_size=50, width=16, depth=1, num_heads=2, mlp_dim=32)


@pytest.fixture
def folder(tmp_path, module):
    """Save a small BERT."""
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    variables = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    convert.save(module, variables, tmp_path / "bert")
    return tmp_path / "bert"


def edit(folder, **changes):
    """Change the tensors of a folder; None removes one."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_missing_unused_and_misshapen_tensor_is_listed(folder):
    edit(
        folder,
        **{
            "embeddings.LayerNorm.weight": None,
            "encoder.layer.0.output.dense.bias": None,
            "encoder.layer.0.intermediate.dense.weight": np.zeros((16, 32), np.float32),
            "encoder.layer.1.output.dense.bias": np.zeros(16, np.float32),
            "adapter.weight": np.zeros(3, np.float32),
        },
    )
    with pytest.raises(UserError) as error:
        convert.load(folder)
    assert str(error.value) == (
        f"{folder} does not fit Bert: "
        "missing embeddings.LayerNorm.weight, encoder.layer.0.output.dense.bias; "
        "unused adapter.weight, encoder.layer.1.output.dense.bias; "
        "mis-shaped encoder.layer.0.intermediate.dense.weight [16, 32] where [32, 16] is needed; "
        "unused ones are left out with drop=[NAME, ...], on the command line --drop NAME."
    )


def test_an_unknown_tensor_is_left_out_only_when_named(folder):
    edit(folder, **{"adapter.weight": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match=r"unused adapter\.weight"):
        convert.load(folder)
    with pytest.raises(UserError, match=r"no tensor adaptr to drop; .* are adapter\.weight\."):
        convert.load(folder, drop=("adaptr",))
    convert.load(folder, drop=("adapter.weight",))


def test_heads_known_by_name_are_left_out_and_said(folder, caplog):
    edit(
        folder,
        **{
            "cls.seq_relationship.weight": np.zeros((2, 16), np.float32),
            "embeddings.position_ids": np.arange(512)[None],
        },
    )
    with caplog.at_level("INFO"):
        convert.load(folder)
    assert "embeddings.position_ids, cls.seq_relationship.weight" in caplog.text


def test_a_head_that_is_half_there_is_missing_the_other_half(folder):
    edit(folder, **{"pooler.dense.weight": np.zeros((16, 16), np.float32)})
    with pytest.raises(UserError, match=r"missing pooler\.dense\.bias"):
        convert.load(folder)
    module, _ = convert.load(folder, pooler=False)
    assert not module.pooler


def test_an_untied_decoder_is_refused_and_an_equal_copy_accepted(folder, module):
    module = module.clone(mlm_head=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    variables = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    convert.save(module, variables, folder)
    edit(folder, **{"cls.predictions.decoder.weight": np.ones((50, 16), np.float32)})
    assert convert.load(folder)[0].mlm_head
    edit(folder, **{"cls.predictions.decoder.weight": np.zeros((50, 16), np.float32)})
    with pytest.raises(UserError, match=r"mlm_head=False"):
        convert.load(folder)
    assert not convert.load(folder, mlm_head=False)[0].mlm_head


def test_variables_that_are_not_the_modules_own_are_not_written(tmp_path, module):
    shapes = jax.eval_shape(module.init, jax.random.key(0), TOKENS)
    variables = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    params = dict(variables["params"], lora=np.ones(2), type_embedding=np.ones((3, 16)))
    del params["word_embedding"]
    with pytest.raises(UserError) as error:
        convert.save(module, {"params": params}, tmp_path / "out")
    assert str(error.value) == (
        "These are not the variables of this Bert: missing params/word_embedding; "
        "unused params/lora; mis-shaped params/type_embedding [3, 16] where [2, 16] is needed."
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new' (only 'gelu')"),
        (
            {"is_decoder": True, "position_embedding_type": "relative"},
            "is_decoder True (only False), position_embedding_type 'relative' (only 'absolute')",
        ),
        ({"model_type": "llama"}, "this project reads resnet, vit, "),
    ],
)
def test_a_config_of_another_architecture_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError) as error:
        convert.load(folder)
    assert message in str(error.value)


def test_a_setting_that_is_not_known_is_refused_unless_named(folder):
    edit_config(folder, residual_scale=0.5, initializer_range=0.1)
    with pytest.raises(UserError, match=r"known here: residual_scale 0\.5; .* ignore=.* --ignore"):
        convert.load(folder)
    with pytest.raises(UserError, match=r"no setting residual to ignore; .* are residual_scale\."):
        convert.load(folder, ignore=("residual",))
    convert.load(folder, ignore=("residual_scale",))


@pytest.mark.hf
@pytest.mark.parametrize("table", architectures.TABLES, ids=lambda table: table.model_types[0])
def test_every_setting_of_transformers_is_read_or_fixed_or_neutral(table):
    """A release that adds a setting fails here, until someone has looked at it."""
    import transformers

    config = transformers.AutoConfig.for_model(table.model_types[0]).to_dict()
    fields = architectures.fields_of(table, config, "")
    assert fields.keys() == {field.name for field in table.fields.values()}


@pytest.mark.parametrize("kept", [0, 7, 40, -1])
def test_a_file_that_is_cut_short_is_named(folder, kept):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    size = len(whole[:kept])
    with pytest.raises(UserError, match=rf"model\.safetensors \({size} bytes\) is cut short"):
        convert.load(folder)
    shard = folder / "model-00001-of-00001.safetensors"
    file.rename(shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": shard.name}}))
    with pytest.raises(UserError, match=r"model-00001-of-00001\.safetensors .* is cut short"):
        convert.load(folder)
    index.write_text('{"weight_map": {"x":')
    with pytest.raises(UserError, match=r"index\.json is cut short or no JSON"):
        convert.load(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json holds a list"):
        convert.load(folder)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.ones((50, 16), np.int64), "mis-typed embeddings.word_embeddings.weight I64 where"),
        (np.full((50, 16), np.nan, np.float32), "'embeddings.word_embeddings.weight' holds NaN"),
        (np.full((50, 16), -np.inf, np.float16), "'embeddings.word_embeddings.weight' holds NaN"),
    ],
)
def test_tensors_that_hold_no_weights_are_refused(folder, tensor, message):
    edit(folder, **{"embeddings.word_embeddings.weight": tensor})
    with pytest.raises(UserError, match=message):
        convert.load(folder)
    mesh = sharding.make_mesh(fsdp=8)
    with pytest.raises(UserError, match=message):
        convert.load(folder, mesh=mesh, rules=[("word_embedding", (None, "fsdp"))])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding_size": -1}, "embedding_size -1; a whole number from 1 on is needed"),
        ({"depths": 1}, "depths 1; a list of whole numbers from 1 on is needed"),
        ({"depths": [1, 1, 1, "1"]}, r"depths \[1, 1, 1, '1'\]; a list of"),
        ({"depths": [1, 1]}, r"hidden_sizes \[.*\] and depths \[1, 1\]; they need one number a"),
    ],
)
def test_sizes_that_are_none_are_refused(tmp_path, changes, message):
    module = resnet.make("tiny")
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    convert.save(module, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        convert.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_norm_eps": "1e-12"}, "layer_norm_eps '1e-12'; a number is needed"),
        ({"layer_norm_eps": None}, "layer_norm_eps None; a number is needed"),
        ({"hidden_dropout_prob": math.inf}, "hidden_dropout_prob inf; a number is needed"),
        ({"attention_probs_dropout_prob": False}, "dropout_prob False; a number is needed"),
    ],
)
def test_what_is_no_number_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        convert.load(folder)


def test_what_is_no_switch_is_refused(tmp_path):
    module = swin.make("tiny")
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 64, 64, 3)))
    convert.save(module, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)
    edit_config(tmp_path, qkv_bias="false")
    with pytest.raises(UserError, match="qkv_bias 'false'; true or false is needed"):
        convert.load(tmp_path)


def test_cxr_bert_is_read_as_bert(folder):
    edit_config(folder, model_type="cxr-bert", projection_size=128)
    edit(folder, **{"cls_projection_head.dense_to_hidden.weight": np.zeros((128, 16), np.float32)})
    assert isinstance(convert.load(folder)[0], bert.Bert)


def test_heads_that_do_not_divide_the_width_are_one_sentence(folder):
    edit_config(folder, num_attention_heads=3)
    with pytest.raises(UserError, match="describes no Bert that can be built: 3 heads do not div"):
        convert.load(folder)


def test_load_into_names_every_field_that_differs(folder, module):
    with pytest.raises(UserError) as error:
        convert.load_into(module.clone(num_heads=4, epsilon=1e-6), folder)
    assert "num_heads is 2 there and 4 here; epsilon is 1e-12 there and 1e-06 here" in str(
        error.value
    )
    with pytest.raises(UserError, match="holds a 'bert', which is not a ResNet"):
        convert.load_into(resnet.make("tiny"), folder)


def test_an_unknown_field_is_answered_with_the_nearest(folder):
    with pytest.raises(UserError, match=r"Bert has no 'poolin'\. Did you mean pooling"):
        convert.load(folder, poolin="mean")


def test_rectangular_images_are_refused(tmp_path):
    module = vit.make("tiny", depth=1, width=16, mlp_dim=16, image_size=32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 32, 32, 3)))
    convert.save(module, jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes), tmp_path)
    edit_config(tmp_path, image_size=[32, 32])
    assert convert.load(tmp_path)[0].image_size == 32
    edit_config(tmp_path, image_size=[32, 64])
    with pytest.raises(UserError, match=r"\[32, 64\]; only squares"):
        convert.load(tmp_path)


def test_a_pickle_is_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds pytorch_model\.bin but no model\.safetensors"):
        convert.load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="holds neither"):
        convert.load(folder)


@pytest.mark.hf
def test_the_command_that_converts_a_pickle_keeps_heads_and_what_lies_beside(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    import transformers

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**size, intermediate_size=32, vocab_size=7)
    model = transformers.BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "old")
    (tmp_path / "old/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "old/pytorch_model.bin")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "left", "Lung"]
    (tmp_path / "old/vocab.txt").write_text("\n".join(words))
    with pytest.raises(UserError) as error:
        convert.load(tmp_path / "old")
    monkeypatch.chdir(tmp_path)
    python, copy = str(error.value).split("python -c ")[1].split(" && ")
    exec(shlex.split(python)[0], {})
    subprocess.run(shlex.split(copy), check=True)
    module, _ = convert.load(tmp_path / "NEW")
    assert (module.mlm_head, module.pooler) == (True, False)
    assert text.load_tokenizer(tmp_path / "NEW").encode("Left left").ids == [2, 1, 5, 3]


def test_a_model_of_the_hub_without_safetensors_ends_in_the_refusal_of_pickles(tmp_path):
    snapshot = tmp_path / "models--owner--a-name" / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    said = {"model_type": "bert", "architectures": ["BertForMaskedLM"]}
    for name in ("preprocessor_config.json", "merges.txt"):
        (snapshot / name).write_text("{}")
    for named, kind in ((["BertForMaskedLM"], "BertForMaskedLM"), (["'); x('"], "AutoModel")):
        (snapshot / "config.json").write_text(json.dumps(said | {"architectures": named}))
        with pytest.raises(
            UserError, match="is of owner/a-name, perhaps with pytorch_model"
        ) as error:
            convert.load(snapshot)
        command = shlex.split(str(error.value).split("installed: ")[1])
        call = 't.{}.from_pretrained("owner/a-name").save_pretrained("NEW")'.format
        steps = ["import transformers as t", call(kind), call("AutoTokenizer")]
        assert command[:3] == ["python", "-c", "; ".join(steps)]
        assert command[3:] == ["&&", "cp", str(snapshot / "preprocessor_config.json"), "NEW"]


def test_shards_that_are_not_all_there_are_named(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    name = "embeddings.LayerNorm.weight"
    index.write_text(json.dumps({"weight_map": {name: "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks model-00002-of-00002\.safetensors"):
        convert.load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "model-00001-of-00002.safetensors"}}))
    with pytest.raises(UserError, match="no shard holds: x"):
        convert.load(folder)
    for other in ([], {"x": 1}):
        index.write_text(json.dumps({"weight_map": other}))
        with pytest.raises(UserError, match="an object is needed that names the file"):
            convert.load(folder)


@pytest.mark.parametrize(
    "shard", ["../out.safetensors", "/out.safetensors", "a/b", "a\\b", "..", "", "a\0"]
)
def test_an_index_names_files_of_its_own_folder_only(folder, shard):
    weights = folder / "model.safetensors"
    names = load_file(weights)
    weights.rename(folder.parent / "out.safetensors")
    shard = shard.replace("/out", f"{folder.parent}/out") if shard.startswith("/") else shard
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    with pytest.raises(UserError) as error:
        convert.load(folder)
    assert f"names the file {shard!r}; accepted are names without a folder" in str(error.value)


def test_the_links_of_a_hub_cache_are_read_and_copied(folder, module, tmp_path):
    model = tmp_path / "models--a--b"
    snapshot = model / "snapshots" / ("0123456789" * 4)
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    names = load_file(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "vocab.txt").write_text("[PAD]\n")
    for number, file in enumerate(folder.iterdir()):
        file.rename(model / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    _, variables = convert.load(snapshot)
    convert.save(module, variables, tmp_path / "out", tokenizer=snapshot)
    assert (tmp_path / "out/vocab.txt").read_text() == "[PAD]\n"
    assert not (tmp_path / "out/vocab.txt").is_symlink()


@pytest.mark.parametrize("place", ["clone", f"models--a--b/snapshots/{'0' * 40}"])
def test_a_link_out_of_a_folder_is_not_copied(folder, module, tmp_path, place):
    _, variables = convert.load(folder)
    source, out = tmp_path / place, tmp_path / "out"
    source.mkdir(parents=True)
    (tmp_path / "secret").write_text("of somebody")
    (source / "tokenizer_config.json").write_text("{}")
    (source / "vocab.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"vocab\.txt is a link to .*secret, outside its folder"):
        convert.save(module, variables, out, tokenizer=source)
    assert not {"vocab.txt", "tokenizer_config.json"} & {file.name for file in out.iterdir()}


def test_a_link_inside_a_folder_is_copied(folder, module, tmp_path):
    _, variables = convert.load(folder)
    (folder / "words").write_text("[PAD]\n")
    (folder / "vocab.txt").symlink_to("words")
    (tmp_path / "named").symlink_to(folder)
    convert.save(module, variables, tmp_path / "out", tokenizer=tmp_path / "named")
    assert (tmp_path / "out/vocab.txt").read_text() == "[PAD]\n"


def test_a_folder_is_needed(tmp_path, folder):
    with pytest.raises(UserError, match=r"is a file; give the folder"):
        convert.load(folder / "config.json")
    with pytest.raises(UserError, match=r"holds no config\.json"):
        convert.load(tmp_path)
    with pytest.raises(UserError, match="'no-one/nothing' is no folder, and the hub"):
        convert.load("no-one/nothing")


@pytest.mark.parametrize("path", ["weights/bret", "./bert", "../bert", "/weights/bret", "~/bert"])
def test_a_folder_that_is_mistyped_is_not_asked_for_at_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights/bert").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"'{path}' is no folder, and it is a path here"):
        convert.fetch(path)


def test_what_is_downloaded_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    for _ in range(2):
        assert convert.fetch("somebody/something") == tmp_path
    out, err = capsys.readouterr()
    assert (out, err.count("downloading somebody/something")) == ("", 1)


def test_a_module_that_has_no_hugging_face_form_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is one of ResNet, ViT, "):
        checkpoint.save(object(), {}, tmp_path)
