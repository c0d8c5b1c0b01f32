"""What others call a key, and what to do here: TRL and transformers, axolotl, LLaMA-Factory. Names of loss options too.

A key's name stands for itself; anything else is a sentence that an error shows.
"""

from __future__ import annotations

_TABLE = {
    # model
    "model_name_or_path": "base_model model model_id model_name pretrained_model_name_or_path",
    "tokenizer_name_or_path": "tokenizer_name tokenizer_config tokenizer base_model_config",
    "model_revision": "revision revision_of_model",
    "chat_template": "chat_template_path chat_template_jinja template",
    "dtype": "torch_dtype pure_bf16 bfloat16",
    "bf16": "amp infer_dtype",
    "fp16": "float16",
    "gradient_checkpointing": "activation_offloading disable_gradient_checkpointing "
                              "gradient_checkpointing_kwargs use_gradient_checkpointing use_unsloth",
    "use_liger_kernel": "enable_liger_kernel liger_rms_norm liger_rope liger_glu_activation",
    "torch_compile": "compile torch_compile_backend torch_compile_mode",
    "packing": "sample_packing neat_packing padding_free eval_sample_packing pad_to_sequence_len group_by_length",
    "fsdp": "deepspeed fsdp_config fsdp_version fsdp_transformer_layer_cls_to_wrap ddp_backend "
            "ddp_find_unused_parameters parallelism_config",
    "disable_dropout": "attention_dropout resid_dropout",
    # adapters
    "use_peft": "adapter finetuning_type peft_config use_lora peft_type",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_target lora_target_linear target_modules",
    "merge_adapter": "adapter_name_or_path lora_model_dir merge_lora",
    "load_in_4bit": "quantization_bit quantization_method quantization_config bnb_config use_4bit",
    "use_bnb_nested_quant": "bnb_4bit_use_double_quant double_quantization",
    "peft": "use_rslora use_dora modules_to_save lora_modules_to_save lora_bias",
    "4-bit bases are bitsandbytes': load_in_4bit=true, with the model that a quantised one was made from":
        "torchao torchao_config quant_method quant_type",
    "leave it out: 4-bit weights compute in bf16, or fp16 where that is set": "bnb_4bit_compute_dtype",
    # run
    "overwrite_output_dir": "overwrite_cache",
    "save_steps": "save_strategy saves_per_epoch save_only_model",
    "logging_steps": "logging_strategy logging_first_step plot_loss log_level",
    "report_to": "use_tensorboard use_wandb",
    "seed": "data_seed full_determinism",
    # data
    "train_dataset": "dataset dataset_name dataset_path datasets data_path dataset_dir train_file train_on_inputs "
                     "dataset_train_split dataset_config dataset_mixer",
    "eval_dataset": "val_set_size test_datasets eval_dataset_name dataset_test_split validation_file test_size",
    "dataset_streaming": "streaming buffer_size",
    "max_length": "max_seq_length max_seq_len sequence_len cutoff_len model_max_length block_size "
                  "max_completion_length max_target_length",
    "truncation_mode": "truncation_side",
    "train_on": "train_on_prompt mask_history completion_only_loss roles_to_train train_on_eos",
    # stage
    "loss": "loss_type rl pref_loss stage dpo_loss method trainer_type objective",
    "beta": "pref_beta dpo_beta rl_beta simpo_beta orpo_beta kto_beta cpo_beta",
    "alpha": "rpo_alpha orpo_alpha cpo_alpha pref_ftx dpo_ftx nll_weight",
    "gamma": "simpo_gamma gamma_beta_ratio simpo_gamma_beta_ratio",
    "label_smoothing": "label_smoothing_factor dpo_label_smoothing",
    "tau": "discopop_tau",
    "f_divergence": "f_divergence_type",
    "desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "center_coefficient": "center_rewards_coefficient",
    "ref_model_name_or_path": "ref_model reference_model ref_model_path reference_model_name_or_path",
    "per_device_train_batch_size": "micro_batch_size batch_size train_batch_size per_gpu_train_batch_size",
    "per_device_eval_batch_size": "eval_batch_size per_gpu_eval_batch_size",
    "max_tokens_per_batch": "auto_find_batch_size",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps global_batch_size",
    "num_train_epochs": "num_epochs epochs n_epochs",
    "max_steps": "max_samples total_steps",
    "learning_rate": "lr peak_lr embedding_lr",
    "loraplus_lr_ratio": "lorap_lr_ratio",
    "leave it out: adapters beside embeddings go without loraplus_lr_ratio": "loraplus_lr_embedding",
    "lr_scheduler_type": "lr_scheduler scheduler cosine_min_lr_ratio lr_scheduler_kwargs",
    "optim": "optimizer optimizer_name optim_args",
    "max_grad_norm": "gradient_clipping clip_grad_norm",
    # evaluation
    "eval_steps": "eval_strategy evaluation_strategy evals_per_epoch do_eval eval_on_start eval_delay",
    "eval_generate": "generate_during_eval predict_with_generate do_predict",
    "eval_max_new_tokens": "eval_max_length",
    "kl_budget": "early_stopping_patience load_best_model_at_end metric_for_best_model target_kl",
    # not keys
    "`fastpref export RUN --push REPO` puts a trained model on the hub":
        "push_to_hub hub_model_id hub_token hub_strategy hub_private_repo export_dir export_hub_model_id",
    "`fastpref train CONFIG --resume` goes on with a run": "resume_from_checkpoint auto_resume_from_checkpoints",
    "leave it out: packed batches have an attention of their own, and others take the fastest there is":
        "attn_implementation flash_attention flash_attn flash_attention_2 xformers_attention sdp_attention "
        "use_flash_attention_2 use_flash_attn flex_attention",
    "leave it out: reference log-probs are always computed once, and kept in a file (reference_dir)":
        "precompute_ref_log_probs precompute_ref_batch_size force_use_ref_model reference_free",
    "leave it out: a stage's reference is fixed; `fastpref rounds` has rounds.reference=previous":
        "sync_ref_model ref_model_mixup_alpha ref_model_sync_steps",
    "leave it out: the fused LM head is what fastpref is": "use_liger_loss liger_fused_linear_cross_entropy "
        "liger_cross_entropy cut_cross_entropy use_logits_to_keep",
    "leave it out: data are read and tokenised once, before the first step":
        "dataloader_num_workers dataset_num_proc dataset_processes preprocessing_num_workers dataloader_pin_memory "
        "dataloader_drop_last dataset_prepared_path remove_unused_columns dataset_kwargs tokenized_path",
    "leave it out: charts are named after output_dir (WANDB_PROJECT names the project)":
        "run_name wandb_project wandb_entity wandb_name wandb_run_id logging_dir",
    "leave it out: `fastpref train` trains, and evaluates where there is an eval_dataset": "do_train",
    "take the loss of that data: loss=sft, kto, bradley_terry or one of pairs": "dataset_type task_type",
    "`fastpref rounds` samples: see rounds.num_generations": "num_generations num_sample_generations",
    "not here, for the fused Trainers of fastpref.integrations.trl (docs/migrating.md)":
        "loss_weights use_weighting ld_alpha router_aux_loss_coef",
    "not here; docs/migrating.md lists what there is instead":
        "neftune_noise_alpha galore use_badam freeze_trainable_layers special_tokens "
        "rope_scaling rope_theta lora_task_type",
    "leave it out: experts run as grouped matrix products, transformers' default": "experts_implementation",
    "leave it out: matrix products of fp32 weights run in bf16 on a GPU (bf16=false: in fp32)": "tf32",
}
ALIASES = {name: text for text, names in _TABLE.items() for name in names.split()}


def hint(name: str) -> str | None:
    """What to do here where another program has a key `name`; None where none known has."""
    said = ALIASES.get(name.lower().replace("-", "_"))
    if said is None:
        return None
    return f"here it is {said}" if said.isidentifier() else said
