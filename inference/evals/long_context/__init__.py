"""Long-context evaluation: LongBench, needle in a haystack, RULER's families; public names come when first used."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["metrics"],
    submod_attrs={
        "catalogue": ["LongContextPlan", "long_context_task_names", "plan_long_context"],
        "options": ["LongContextOptions"],
        "prediction_files": ["score_predictions"],
        "prompts": ["PromptFitter"],
        "report_sections": ["add_long_context", "needle_figure"],
        "summary": ["summarise"],
    },
)
