"""The config.json of published models, as the hub has them, is read as the size of that name."""

import pytest

from medvlp_jax.config import UserError
from medvlp_jax.convert import architectures, checkpoint
from medvlp_jax.encoders import (
    bert,
    clip_text,
    clip_vision,
    dinov2,
    dinov3,
    modernbert,
    qwen3,
    resnet,
    siglip,
    siglip_text,
    swin,
    vit,
)

VIT = {
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "hidden_size": 768,
    "image_size": 224,
    "initializer_range": 0.02,
    "num_attention_heads": 12,
    "num_channels": 3,
    "num_hidden_layers": 12,
    "qkv_bias": True,
}
STAGES = {
    "apply_layernorm": True,
    "out_features": ["stage12"],
    "out_indices": [12],
    "reshape_hidden_states": True,
    "stage_names": ["stem", *(f"stage{i}" for i in range(1, 13))],
}
DINOV2 = VIT | STAGES | {"drop_path_rate": 0.0, "image_size": 518, "layer_norm_eps": 1e-06}
DINOV2 |= {"layerscale_value": 1.0, "mlp_ratio": 4, "patch_size": 14, "use_swiglu_ffn": False}
BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
# What transformers 4.16 wrote into each config of an encoder of two.
GENERAL = {
    "_name_or_path": "",
    "add_cross_attention": False,
    "architectures": None,
    "bad_words_ids": None,
    "chunk_size_feed_forward": 0,
    "cross_attention_hidden_size": None,
    "decoder_start_token_id": None,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "finetuning_task": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "is_encoder_decoder": False,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_attentions": False,
    "output_hidden_states": False,
    "output_scores": False,
    "prefix": None,
    "problem_type": None,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict": True,
    "return_dict_in_generate": False,
    "sep_token_id": None,
    "task_specific_params": None,
    "temperature": 1.0,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": True,
    "tokenizer_class": None,
    "top_k": 50,
    "top_p": 1.0,
    "torch_dtype": None,
    "torchscript": False,
    "transformers_version": "4.16.0.dev0",
    "use_bfloat16": False,
}
CLIP = GENERAL | {
    "attention_dropout": 0.0,
    "dropout": 0.0,
    "hidden_act": "quick_gelu",
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "layer_norm_eps": 1e-05,
    "num_hidden_layers": 12,
    "projection_dim": 512,
}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PUBLISHED = {
    "microsoft/resnet-50": (
        resnet.make("50"),
        {
            "depths": [3, 4, 6, 3],
            "downsample_in_first_stage": False,
            "embedding_size": 64,
            "hidden_act": "relu",
            "hidden_sizes": [256, 512, 1024, 2048],
            "layer_type": "bottleneck",
            "model_type": "resnet",
            "num_channels": 3,
        },
    ),
    "google/vit-base-patch16-224-in21k": (
        vit.make("B/16"),
        VIT
        | {"intermediate_size": 3072, "layer_norm_eps": 1e-12, "model_type": "vit"}
        | {"patch_size": 16},
    ),
    "microsoft/swin-tiny-patch4-window7-224": (
        swin.make("T"),
        {
            "attention_probs_dropout_prob": 0.0,
            "depths": [2, 2, 6, 2],
            "drop_path_rate": 0.1,
            "embed_dim": 96,
            "encoder_stride": 32,
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "hidden_size": 768,
            "image_size": 224,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-05,
            "mlp_ratio": 4.0,
            "model_type": "swin",
            "num_channels": 3,
            "num_heads": [3, 6, 12, 24],
            "num_layers": 4,
            "patch_size": 4,
            "path_norm": True,
            "qkv_bias": True,
            "use_absolute_embeddings": False,
            "window_size": 7,
        },
    ),
    "facebook/dinov2-base": (dinov2.make("B/14"), DINOV2 | {"model_type": "dinov2"}),
    "facebook/dinov2-with-registers-base": (
        dinov2.make("B/14-reg"),
        DINOV2
        | {"interpolate_antialias": True, "interpolate_offset": 0.0, "num_register_tokens": 4}
        | {"model_type": "dinov2_with_registers"},
    ),
    "facebook/dinov3-vitb16-pretrain-lvd1689m": (
        dinov3.make("B/16"),
        {
            "attention_dropout": 0.0,
            "drop_path_rate": 0.0,
            "hidden_act": "gelu",
            "hidden_size": 768,
            "image_size": 224,
            "initializer_range": 0.02,
            "intermediate_size": 3072,
            "key_bias": False,
            "layer_norm_eps": 1e-05,
            "layerscale_value": 1.0,
            "mlp_bias": True,
            "model_type": "dinov3_vit",
            "num_attention_heads": 12,
            "num_channels": 3,
            "num_hidden_layers": 12,
            "num_register_tokens": 4,
            "patch_size": 16,
            "pos_embed_jitter": None,
            "pos_embed_rescale": 2.0,
            "pos_embed_shift": None,
            "proj_bias": True,
            "query_bias": True,
            "rope_theta": 100.0,
            "use_gated_mlp": False,
            "value_bias": True,
        },
    ),
    "emilyalsentzer/Bio_ClinicalBERT": (bert.make("base"), BERT | {"vocab_size": 28996}),
    "microsoft/BiomedVLP-CXR-BERT-specialized": (
        bert.make("cxr"),
        BERT
        | {
            "architectures": ["CXRBertModel"],
            "attention_probs_dropout_prob": 0.25,
            "auto_map": {"AutoModel": "modeling_cxrbert.CXRBertModel"},
            "classifier_dropout": None,
            "gradient_checkpointing": False,
            "hidden_dropout_prob": 0.25,
            "model_type": "cxr-bert",
            "position_embedding_type": "absolute",
            "projection_size": 128,
            "use_cache": True,
            "vocab_size": 30522,
        },
    ),
    "answerdotai/ModernBERT-base": (
        modernbert.make("base"),
        {
            "architectures": ["ModernBertForMaskedLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 50281,
            "classifier_activation": "gelu",
            "classifier_bias": False,
            "classifier_dropout": 0.0,
            "classifier_pooling": "mean",
            "cls_token_id": 50281,
            "decoder_bias": True,
            "deterministic_flash_attn": False,
            "embedding_dropout": 0.0,
            "eos_token_id": 50282,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0,
            "gradient_checkpointing": False,
            "hidden_activation": "gelu",
            "hidden_size": 768,
            "initializer_cutoff_factor": 2.0,
            "initializer_range": 0.02,
            "intermediate_size": 1152,
            "layer_norm_eps": 1e-05,
            "local_attention": 128,
            "local_rope_theta": 10000.0,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "mlp_dropout": 0.0,
            "model_type": "modernbert",
            "norm_bias": False,
            "norm_eps": 1e-05,
            "num_attention_heads": 12,
            "num_hidden_layers": 22,
            "pad_token_id": 50283,
            "position_embedding_type": "absolute",
            "sep_token_id": 50282,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "vocab_size": 50368,
        },
    ),
    "Qwen/Qwen3-0.6B": (
        qwen3.make("0.6B"),
        QWEN3
        | {"hidden_size": 1024, "intermediate_size": 3072, "max_window_layers": 28}
        | {"num_attention_heads": 16, "num_hidden_layers": 28, "tie_word_embeddings": True},
    ),
    "Qwen/Qwen3-8B": (
        qwen3.make("8B"),
        QWEN3
        | {"hidden_size": 4096, "intermediate_size": 12288, "max_window_layers": 36}
        | {"num_attention_heads": 32, "num_hidden_layers": 36, "tie_word_embeddings": False},
    ),
}
TOWERS = {
    "openai/clip-vit-base-patch32": {
        "architectures": ["CLIPModel"],
        "initializer_factor": 1.0,
        "logit_scale_init_value": 2.6592,
        "model_type": "clip",
        "projection_dim": 512,
        "text_config_dict": None,
        "vision_config_dict": None,
        "text_config": CLIP
        | {"bos_token_id": 0, "eos_token_id": 2, "hidden_size": 512, "intermediate_size": 2048}
        | {"max_position_embeddings": 77, "model_type": "clip_text_model", "pad_token_id": 1}
        | {"num_attention_heads": 8, "vocab_size": 49408},
        "vision_config": CLIP
        | {"hidden_size": 768, "image_size": 224, "intermediate_size": 3072, "patch_size": 32}
        | {"model_type": "clip_vision_model", "num_attention_heads": 12},
    },
    "google/siglip-so400m-patch14-384": {
        "architectures": ["SiglipModel"],
        "initializer_factor": 1.0,
        "model_type": "siglip",
        "text_config": {"hidden_size": 1152, "model_type": "siglip_text_model"},
        "vision_config": {
            "hidden_size": 1152,
            "image_size": 384,
            "intermediate_size": 4304,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 27,
            "patch_size": 14,
        },
    },
}


def different(config, module, ignored=checkpoint.TRAINING_FIELDS):
    """Return the fields config.json says otherwise than the module, those of training aside."""
    table = architectures.table_of_config(config, "FOLDER")
    assert isinstance(module, table.module)
    fields = architectures.fields_of(table, config, "FOLDER")
    return {
        name: value
        for name, value in fields.items()
        if name not in ignored and value != getattr(module, name)
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_the_size_of_that_name(name):
    module, config = PUBLISHED[name]
    assert different(config, module) == {}


@pytest.mark.parametrize(
    ("name", "tower", "module", "expected"),
    [
        ("openai/clip-vit-base-patch32", "vision", clip_vision.make("B/32"), {}),
        # The id of the end in files from before transformers 4.31, see encoders.clip_text.
        ("openai/clip-vit-base-patch32", "text", clip_text.make("B/32"), {"eos_id": 2}),
        ("google/siglip-so400m-patch14-384", "vision", siglip.make("So400m/14-384"), {}),
        # What that file says of the text tower is its width alone: the rest are defaults of the
        # class, as `transformers` reads it too.
        (
            "google/siglip-so400m-patch14-384",
            "text",
            siglip_text.make("B"),
            {"width": 1152, "projection_dim": 1152},
        ),
    ],
)
def test_a_published_config_of_two_encoders_is_read_as_the_tower(name, tower, module, expected):
    config = checkpoint.config_of_tower(TOWERS[name], tower, "FOLDER")
    assert different(config, module) == expected


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("answerdotai/ModernBERT-base", {"position_embedding_type": "relative"}),
        ("microsoft/swin-tiny-patch4-window7-224", {"path_norm": False}),
        ("Qwen/Qwen3-0.6B", {"is_decoder": True}),
        ("facebook/dinov2-with-registers-base", {"interpolate_antialias": False}),
    ],
)
def test_a_key_of_older_files_is_refused_where_it_says_something_else(name, changes):
    (key, value), *_ = changes.items()
    with pytest.raises(UserError, match=f"{key} {value!r}"):
        different({**PUBLISHED[name][1], **changes}, PUBLISHED[name][0])
