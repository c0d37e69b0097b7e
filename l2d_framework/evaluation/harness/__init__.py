"""The model `l2d` of lm-evaluation-harness; needs the extra `eval`.

`lm_eval --model l2d --model_args pretrained=PATH --tasks gsm8k` finds it by an entry point or the start-up hook;
`l2d eval` and `python -m l2d_framework.evaluation.harness` work without either.
"""
