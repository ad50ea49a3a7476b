"""Suggestions for misspelt words; they are only shown, never applied."""

from __future__ import annotations

import difflib
from collections.abc import Collection

USUAL_NAMES = {
    "experiment_name": "exp exp_name experiment project project_name",
    "run_name": "name run run_id version",
    "experiments_folder": "experiments_dir log_dir logdir o out out_dir outdir output output_dir save_dir work_dir",
    "output": "o out output_file output_path",
    "dataset_folder": "data data_dir data_folder data_path data_root dataset dataset_dir dataset_path input root",
    "database": "db db_name",
    "db_pass_file": "db_password db_password_file password pw",
    "pretrained_model": "checkpoint ckpt finetune from_pretrained init_from pretrained weights",
    "num_trials": "n_trials num_runs trials",
    "parallel": "n_jobs num_jobs num_parallel",
    "space": "search_space",
    "resume": "continue resume_from",
    "num_workers": "j n_workers num_data_workers workers",
    "checkpoint_every": "checkpoint_interval save_every save_freq save_interval",
    "keep_checkpoints": "num_checkpoints save_total_limit",
    "tracking_uri": "mlflow mlflow_uri tracking",
    "config": "c cfg conf config_file",
    "print_config": "dump_config show_config",
    "model": "a arch architecture backbone model_name net network",
    "num_epochs": "e epoch epochs max_epochs n_epochs num_train_epochs",
    "batch_size": "b batch bs train_batch_size",
    "image_size": "img_size imgsz input_size resolution size",
    "optimizer": "opt optim optimiser",
    "learning_rate": "base_lr lr max_lr",
    "body_learning_rate": "backbone_learning_rate backbone_lr body_lr lr_backbone",
    "freeze": "freeze_backbone freeze_body freeze_encoder head_only linear_probe",
    "momentum": "m mom",
    "weight_decay": "decay l2 wd",
    "schedule": "lr_schedule lr_scheduler sched scheduler",
    "warmup_fraction": "pct_start warmup warmup_epochs warmup_ratio warmup_steps",
    "label_smoothing": "ls smoothing",
    "flip": "hflip horizontal_flip mirror",
    "translate": "padding random_crop shift",
    "cutout": "cutout_size random_erasing",
    "color_jitter": "brightness colorjitter colour_jitter",
    "rand_augment": "aa auto_augment randaug randaugment",
    "mixup": "mixup_alpha",
    "cutmix": "cutmix_alpha",
    "sampler": "balanced_sampler oversample weighted_sampler",
    "shuffle_window": "shuffle shuffle_buffer shuffle_buffer_size shuffle_size",
    "class_weights": "class_weight loss_weights pos_weight",
    "views": "test_time_augmentation tta",
    "input_mean": "mean",
    "input_std": "std",
    "validation_fraction": "val_fraction val_ratio val_size val_split validation_size validation_split",
    "keep": "keep_best save_best",
    "ema_decay": "ema model_ema model_ema_decay swa",
    "early_stopping": "early_stop early_stopping_patience patience",
    "seed": "manual_seed random_seed random_state",
    "device": "accelerator cuda gpu gpus",
    "precision": "amp bf16 dtype fp16 half mixed_precision",
    "engine": "compile torch_compile",
    "num_threads": "cpus n_threads nthreads threads",
    "train": "fit",
    "evaluate": "eval test validate",
    "predict": "infer inference",
    "publish": "convert deploy export",
    "serve": "server",
}
"""What others call it (timm, Lightning, Transformers, Keras), by the name that it has here; the first that there is
counts."""

_CUTOFF = 0.6
"""Of difflib's ratio, which its documentation recommends."""


def find_meant(word: str, known: Collection[str]) -> str | None:
    """Find the known word that another one most likely means; None if none is near.

    Dashes count as underscores, capitals as small letters.
    """
    name = word.strip("-").replace("-", "_").lower()
    for target in (name, *(target for target, names in USUAL_NAMES.items() if name in names.split())):
        if target in known and target != word:
            return target
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_CUTOFF)), None)


def suggest(word: str, known: Collection[str], prefix: str = "") -> str:
    """Suggest the known word that another one most likely means, in parentheses; nothing if none is near.

    Args:
        prefix: what stands before the known words where a person writes them, such as `--`.
    """
    meant = find_meant(word, known)
    return f" (did you mean {prefix}{meant}?)" if meant else ""
