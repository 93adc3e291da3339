"""Keys of other training tools, and what a config of mmtrain has in their place."""

_NAMES = {
    "model.path": "model_name_or_path model_id model_id_or_path model_name base_model",
    "model.adapter, to start from its trained weights": "adapter_name_or_path adapters lora_model_dir",
    "model.dtype: float32 or bfloat16": "bf16 fp16 torch_dtype pure_bf16 precision",
    "model.quantization: nf4": "load_in_4bit load_in_8bit quantization_bit quantization_method quant_method quant_bits",
    "model.chat_template, a file; without it the model's own": "template template_type chat_template_path",
    "model.image_processor, a section of the image processor's own settings": "image_max_pixels image_min_pixels "
    "max_pixels min_pixels",
    "tune.vision.mode, tune.projector.mode and tune.language.mode: frozen, lora or full": "finetuning_type tuner_type "
    "train_type adapter use_peft freeze_llm freeze_language_model freeze_vit freeze_vision_tower freeze_aligner "
    "freeze_multi_modal_projector lock_image lock_text",
    "tune.language.rank": "lora_rank lora_r r",
    "tune.language.alpha": "lora_alpha",
    "tune.language.dropout": "lora_dropout",
    "tune.language.targets, a list; without it every linear layer": "lora_target lora_target_modules "
    "lora_target_linear target_modules",
    "tune.language.variant: dora": "use_dora peft_use_dora",
    "tune.language.variant: rslora": "use_rslora peft_use_rslora",
    "tune.vision.learning_rate": "vit_lr vision_lr",
    "tune.projector.learning_rate": "aligner_lr projector_lr",
    "data.train, the path of a file or folder": "dataset datasets dataset_name dataset_path dataset_dir train_dataset "
    "train_file data_path",
    "root, of a source in data.train": "media_dir image_folder images_dir",
    "fields, of a source in data.train": "csv_img_key csv_caption_key",
    "data.eval, a path or {from: train, share: 0.05}": "eval_dataset val_dataset test_datasets val_size val_set_size "
    "split_dataset_ratio test_size do_eval",
    "data.max_length; longer samples are refused, or dropped with data.too_long": "cutoff_len sequence_len "
    "max_seq_length max_seq_len model_max_length truncation_strategy",
    "labels.train_on: assistant or last": "train_on_inputs train_on_prompt mask_history assistant_only_loss "
    "completion_only_loss roles_to_train",
    "train.epochs": "num_train_epochs num_epochs",
    "train.steps": "max_steps",
    "train.batch_size, the product of batch size, accumulation and devices": "per_device_train_batch_size "
    "micro_batch_size gradient_accumulation_steps",
    "train.learning_rate": "lr",
    "train.schedule": "lr_scheduler_type lr_scheduler",
    "train.warmup_steps, a number of steps": "warmup_ratio warmup",
    "train.weight_decay": "wd",
    "train.early_stopping": "early_stopping_patience",
    "run.checkpoint_every": "save_steps saves_per_epoch save_strategy",
    "run.keep_checkpoints": "save_total_limit",
    "run.keep_best": "load_best_model_at_end metric_for_best_model",
    "run.eval_every": "eval_steps evals_per_epoch eval_strategy",
    "run.microbatch_tokens, tokens that go through the model at once": "per_device_eval_batch_size eval_batch_size "
    "mini_batch_size gc_q_chunk_size gc_p_chunk_size accum_freq",
    "run.packing: on where the model allows it": "sample_packing neat_packing padding_free",
    "run.activation_checkpointing": "gradient_checkpointing vit_gradient_checkpointing grad_checkpointing",
    "run.weights: shard, for FSDP2": "deepspeed fsdp fsdp_config",
    "run.compile": "torch_compile",
    "run.hang_timeout, in seconds": "ddp_timeout",
    "run.trackers": "report_to use_wandb wandb_project",
    "objective.scale, which is 1 / temperature: trained, fixed or a number": "temperature temp logit_scale "
    "init_logit_scale",
    "objective.loss: sigmoid": "siglip",
    "objective.bias": "init_logit_bias logit_bias",
    "objective.dims, a list": "matryoshka_dims",
    "objective.pooling: family, last or mean": "pooling_mode",
}
_NOT_NEEDED = {
    "the same command resumes, and --fresh starts over": "resume_from_checkpoint auto_resume_from_checkpoints "
    "overwrite_output_dir",
    "the optimizer is AdamW": "optim optimizer",
    "all items of a step are compared, whatever the processes and micro-batches": "gather_with_grad local_loss "
    "gather_across_devices grad_cache",
    "embeddings are always normalized": "normalize normalize_embeddings",
    "every step is in metrics.jsonl": "logging_steps logging_strategy plot_loss",
    "code of a model directory is never run": "trust_remote_code",
    "mmtrain decides it": "stage do_train flash_attn flash_attention attn_impl attn_implementation overwrite_cache "
    "remove_unused_columns skip_prepare_dataset processor_type preprocessing_num_workers dataset_num_proc "
    "dataloader_num_workers dataset_prepared_path enable_liger_kernel use_liger_kernel",
}
_IN_WORDS = {f"use {ours}": names for ours, names in _NAMES.items()}
_IN_WORDS |= {f"remove it: {why}": names for why, names in _NOT_NEEDED.items()}

INSTEAD = {name: words for words, names in _IN_WORDS.items() for name in names.split()}
"""What to do with each key of LLaMA-Factory, ms-swift, axolotl and TRL, and of open_clip, sentence-transformers and
VLM2Vec."""


def table() -> str:
    """The same as a table in Markdown."""
    rows = (f"| {', '.join(f'`{name}`' for name in names.split())} | {words} |" for words, names in _IN_WORDS.items())
    return "\n".join(["| key of another tool | in mmtrain |", "|---|---|", *rows, ""])
