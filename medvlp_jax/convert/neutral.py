"""Settings of config.json that do not change what an encoder computes outside training.

How it was initialised; ids of tokens, which are the tokenizer's business; heads that are left out;
outputs of backbones; and what releases of `transformers` have kept beside a model's own settings,
generation foremost. An architecture that does read one of them has it among its fields.
"""

_NAMES = """
_attn_implementation_autoset _commit_hash _name_or_path architectures attn_implementation auto_map
chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label is_encoder_decoder
label2id language model_type name_or_path num_labels output_attentions output_hidden_states
output_past problem_type pruned_heads return_dict task_specific_params tf_legacy_loss
tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache

dropout initializer_cutoff_factor initializer_factor initializer_range

bos_token_id cls_token_id decoder_start_token_id eos_token_id mask_token_id pad_token_id
sep_token_id unk_token_id

classifier_dropout classifier_pooling directionality pooler_fc_size pooler_num_attention_heads
pooler_num_fc_layers pooler_output_size pooler_size_per_head pooler_type projection_dim
projection_size sparse_pred_ignore_index sparse_prediction tie_word_embeddings

apply_layernorm encoder_stride hidden_size image_size num_layers out_features out_indices
reshape_hidden_states stage_names

deterministic_flash_attn max_window_layers reference_compile repad_logits_with_grad sliding_window

bad_words_ids begin_suppress_tokens cross_attention_hidden_size diversity_penalty do_sample
early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
forced_eos_token_id length_penalty low_memory max_length min_length no_repeat_ngram_size
num_beam_groups num_beams num_return_sequences output_scores penalty_alpha prefix
remove_invalid_values renormalize_logits repetition_penalty return_dict_in_generate suppress_tokens
temperature tie_encoder_decoder top_k top_p typical_p
"""

NEUTRAL = frozenset(_NAMES.split())

# Settings that every config of some releases has, whatever the architecture: what they must be.
OFF = {"is_decoder": False, "add_cross_attention": False}
