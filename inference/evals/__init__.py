"""Scoring over lm-eval: models, tasks, digests, results and reports; public names are imported when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "digest": ["model_digest", "samples_digest", "tokenizer_digest"],
        "harness": ["evaluate_model"],
        "loading": ["check_tokenizer", "load_model", "load_tokenizer"],
        "model_lm": ["TransformersLM"],
        "report": ["Page", "plot", "table"],
        "results": ["print_scores", "write_results"],
        "scores": ["Score", "score_figure", "scores_of"],
        "task_selection": ["TaskSelection", "all_task_names", "select_tasks", "shipped_task_names"],
        "wandb_log": ["WandbOptions", "log_to_wandb"],
        "wikipedia_tasks": ["build_wikipedia_tasks"],
    },
)
