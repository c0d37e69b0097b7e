"""What this package assumes of its dependencies beyond their documentation: a rename fails here, by name."""

import inspect
from typing import Any

import pytest
import torch
from tiny_models import tiny_lm
from transformers import AutoConfig, DynamicCache, PreTrainedModel, Trainer, TrainingArguments


def test_transformers_attention_kernel_is_read_and_set_by_a_private_field():
    lm = tiny_lm("llama", attn_implementation="eager")
    assert lm.config._attn_implementation == "eager"
    lm.config._attn_implementation = "sdpa"
    assert lm.config._attn_implementation == "sdpa"


def test_transformers_builds_and_initialises_by_private_methods():
    assert "dtype" in inspect.getsource(PreTrainedModel._from_config)
    lm = tiny_lm("llama")
    layer = torch.nn.Linear(32, 32)
    layer.weight.data.fill_(7.0)
    lm._init_weights(layer)
    assert float(layer.weight.detach().abs().max()) < 1


def test_transformers_knows_masked_models_by_a_table_of_names():
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    assert {"bert", "roberta"} <= set(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


def test_transformers_cache_keeps_keys_and_values_by_layer():
    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    found = cache.update(keys, keys, 0)
    assert [part.shape for part in found] == [keys.shape] * 2
    assert cache.layers[0].keys.shape == cache.layers[0].values.shape == keys.shape
    assert cache.get_seq_length() == 3


def test_transformers_layers_take_one_cache_and_return_their_hidden_states():
    lm: Any = tiny_lm("llama")
    accepted = inspect.signature(type(lm.model.layers[0]).forward).parameters
    assert {"past_key_values", "cache"} & set(accepted)
    seen: list[Any] = []
    hook = lm.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        lm(torch.tensor([[5, 6]]), use_cache=True)
    hook.remove()
    args, kwargs = seen[0]
    assert len(args) == 1 and args[0].shape == (1, 2, 32)
    assert {"attention_mask", "position_ids", "position_embeddings"} <= set(kwargs)


def test_transformers_runs_a_loop_of_ours_inside_generate():
    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return input_ids + generation_config.max_length

    ids = torch.tensor([[5, 6]])
    assert tiny_lm("llama").generate(ids, custom_generate=loop, max_new_tokens=3).tolist() == [[10, 11]]


def test_transformers_counts_the_devices_of_a_run_by_a_private_field(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.n_gpu == 0
    arguments._n_gpu = 1
    assert arguments.n_gpu == 1


def test_transformers_reads_a_config_without_weights(saved_tiny_lm):
    folder = saved_tiny_lm()
    config = AutoConfig.from_pretrained(folder)
    assert PreTrainedModel._from_config.__func__ and config.model_type == "llama"


def test_peft_adapts_modules_in_place_and_gives_their_update():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4, bias=False)})
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["a"]), model, "diffusion")
    layer: Any = model["a"]
    assert isinstance(layer, Linear) and isinstance(layer, LoraLayer)
    assert layer.get_base_layer().weight.shape == (4, 4)
    assert layer.lora_A["diffusion"].weight.shape == (2, 4)
    assert layer.get_delta_weight("diffusion").shape == (4, 4)


def test_peft_puts_a_class_of_ours_on_modules_of_any_kind():
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import Linear

    class Ours(Linear):
        pass

    config, model = LoraConfig(r=2, target_modules=["a"]), torch.nn.ModuleDict({"a": torch.nn.Linear(4, 4)})
    config._register_custom_module({torch.nn.Module: Ours})
    assert isinstance(inject_adapter_in_model(config, model, "diffusion")["a"], Ours)


def test_transformers_templates_are_compiled_by_an_environment_that_tracks_generation_markers():
    from jinja2.environment import Environment
    from jinja2.utils import Namespace
    from transformers.utils.chat_template_utils import _compile_jinja_template

    environment = _compile_jinja_template("").environment
    assert {"tojson"} <= environment.filters.keys() and {
        "raise_exception",
        "strftime_now",
    } <= environment.globals.keys()
    template = environment.from_string("a{% generation %}b{% endgeneration %}")
    pieces: list[str] = []
    spans: list[tuple[int, int]] = []
    with environment.activate_tracker(pieces, spans):
        for piece in template.generate():
            pieces.append(piece)
    assert ("".join(pieces), spans) == ("ab", [(1, 2)])
    assert list(inspect.signature(Environment._compile).parameters) == ["self", "source", "filename"]
    assert Namespace(a=1)._Namespace__attrs == {"a": 1}


def test_transformers_knows_a_quantizer_by_its_section_without_weights():
    from transformers.quantizers.auto import AutoHfQuantizer
    from transformers.utils.import_utils import is_gguf_available

    quantizer = AutoHfQuantizer.from_config({"quant_method": "bitsandbytes", "load_in_8bit": True}, pre_quantized=True)
    assert callable(quantizer.validate_environment) and isinstance(quantizer.is_trainable, bool)
    assert isinstance(is_gguf_available(), bool)


def test_torch_lets_a_subclass_stand_for_a_tensor():
    from torch.utils import _pytree

    assert callable(torch.Tensor._make_wrapper_subclass)
    assert _pytree.tree_map(lambda x: x + 1, [1]) == [2]
    assert torch.ops.aten._softmax.default._schema.name == "aten::_softmax"
    parameter = torch.nn.Parameter(torch.zeros(1))
    before = parameter._version
    with torch.no_grad():
        parameter.add_(1)
    assert parameter._version > before


def test_datasets_names_a_data_set_by_a_fingerprint():
    from datasets import Dataset

    first, second = Dataset.from_list([{"a": 1}]), Dataset.from_list([{"a": 2}])
    assert first._fingerprint != second._fingerprint


def test_lm_eval_keeps_filters_metrics_and_models_where_the_adapter_looks():
    pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, resolve_max_length
    from lm_eval.utils import simple_parse_args_string

    assert issubclass(HFLM, TemplateLM)
    for name in ("_detect_batch_size", "_encode_pair", "_loglikelihood_tokens", "tok_encode", "apply_chat_template"):
        assert callable(getattr(HFLM, name)), name
    source = inspect.getsource(ConfigurableTask)
    assert "self._filters" in source and "_metric_fn_list" in source
    assert {"hf", "dummy"} <= set(model_registry)
    assert simple_parse_args_string("a=1,b=x") == {"a": 1, "b": "x"}
    assert all(map(callable, (handle_stop_sequences, normalize_gen_kwargs, resolve_max_length)))


def test_accelerate_and_trl_offer_what_training_overrides():
    from accelerate import Accelerator

    assert {"gather", "reduce", "prepare", "prepare_model", "prepare_optimizer", "is_fsdp2"} <= set(dir(Accelerator))
    pytest.importorskip("trl")
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

    assert callable(RewardTrainer) and callable(DataCollatorForPreference) and RewardConfig


def test_weights_in_shares_are_prepared_saved_and_loaded_where_training_overrides_it():
    from accelerate.state import AcceleratorState, PartialState
    from torch.distributed import distributed_c10d

    wanted = {"create_accelerator_and_postprocess", "_save", "_save_optimizer_and_scheduler", "_load_from_checkpoint"}
    assert wanted | {"_load_optimizer_and_scheduler"} <= set(dir(Trainer))
    assert "self._load_from_checkpoint" in inspect.getsource(Trainer._prepare_for_training)
    assert isinstance(AcceleratorState._shared_state, dict) and isinstance(PartialState._shared_state, dict)
    assert callable(distributed_c10d._get_default_store)
