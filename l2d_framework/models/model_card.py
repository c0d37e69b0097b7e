"""The model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from l2d_framework.models.diffusion_lm import DiffusionLM


def model_card(model: DiffusionLM, notes: str = "") -> str:
    """Text of the checkpoint's README.md."""
    base = model.origin.model.base if model.origin.model is not None else None
    own = sum(p.numel() for p in model.own_parameters().values())
    rest = "which is part of them" if model.backbone.trains_lm else "whose weights are not part of this repository"
    is_hub = base is not None and not Path(base).exists() and base.count("/") == 1
    head = ["---", "library_name: l2d-framework", "pipeline_tag: text-generation", "tags: [diffusion, l2d-framework]"]
    head += [f"base_model: {base}"] if is_hub else []
    return "\n".join(
        [
            *head,
            "---",
            "",
            "# Diffusion language model",
            "",
            f"{own:,} trained parameters over `{base}`, {rest}.",
            "",
            "```python",
            "import l2d_framework as l2d",
            "",
            'lm = l2d.load("PATH_OR_HUB_ID")',
            'print(lm.tokenizer.decode(lm.generate(["Hello"], max_new_tokens=32).sequences[0]))',
            "```",
            "",
            f"Schedule `{model.schedule.config.component_name()}`, parametrization "
            f"`{model.parametrization.config.component_name()}`, backbone `{model.backbone.config.component_name()}`.",
            "",
            notes,
        ]
    )
