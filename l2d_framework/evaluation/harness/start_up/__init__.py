"""What makes lm_eval know the model `l2d` when Python starts; `_l2d_lm_eval_hook` moves to the top of site-packages."""
