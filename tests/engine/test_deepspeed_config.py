"""What DeepSpeed gets to read: filled in by lowmem, never contradicting it."""

import json
from pathlib import Path
from typing import Any

import pytest

from lowmem.config.keys import NVME_REFUSAL
from lowmem.config.schema import EngineConfig, OptimConfig, RunConfig, TrainConfig
from lowmem.engine.deepspeed import ds_config
from lowmem.engine.deepspeed.ds_config import build_deepspeed_config, default_document, offloads_optimizer, zero_stage
from lowmem.system.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs" / "deepspeed"


def build(engine: dict[str, Any], **train: Any) -> dict[str, Any]:
    train = {"steps": 1, "global_batch_size": 24, "precision": "fp32", **train}
    config = RunConfig(train=TrainConfig(**train), optim=OptimConfig(clip=0.7), engine=EngineConfig(name="deepspeed", **engine))
    return build_deepspeed_config(config, world_size=2, micro_batch_size=3)


def write(folder: Path, document: Any) -> dict[str, Any]:
    (folder / "deepspeed.json").write_text(json.dumps(document))
    return {"config": str(folder / "deepspeed.json")}


@pytest.mark.parametrize(("stage", "offload"), [(0, False), (1, False), (2, False), (2, True), (3, False), (3, True)])
def test_shipped_files_are_what_the_fields_choose(stage: int, offload: bool) -> None:
    name = f"zero{stage}{'_offload' if offload else ''}.json"
    assert json.loads((CONFIGS / name).read_text()) == default_document(stage, offload)
    by_file = build({"config": str(CONFIGS / name)})
    assert by_file == build({"zero_stage": stage, "offload": "cpu" if offload else "none"})
    assert (zero_stage(by_file), offloads_optimizer(by_file)) == (stage, offload)


def test_no_auto_is_left_and_batches_multiply() -> None:
    document = build({"config": str(CONFIGS / "zero3_offload.json")})
    assert '"auto"' not in json.dumps(document)
    assert document["train_batch_size"] == 24 == document["train_micro_batch_size_per_gpu"] * document["gradient_accumulation_steps"] * 2
    assert document["gradient_clipping"] == 0.7


def test_file_wins_over_the_fields() -> None:
    document = build({"config": str(CONFIGS / "zero2.json"), "zero_stage": 3, "offload": "cpu"})
    assert (zero_stage(document), offloads_optimizer(document)) == (2, False)


def test_stage_0_computes_bf16_under_autocast_and_leaves_clipping_to_the_engine() -> None:
    document = build({}, precision="bf16")
    assert document["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert document["bf16"]["enabled"] is False
    assert document["gradient_clipping"] == 0.0


def test_zero_stages_compute_bf16_with_an_fp32_master_and_fp32_accumulation() -> None:
    document = build({"zero_stage": 2}, precision="bf16")
    assert document["bf16"]["enabled"] is True
    assert document["data_types"]["grad_accum_dtype"] == "fp32"
    assert document["torch_autocast"] == {"enabled": False}


def test_equal_numbers_and_free_settings_are_accepted(tmp_path: Path) -> None:
    document = build(
        write(tmp_path, {"train_batch_size": 24, "gradient_clipping": 0.7, "zero_optimization": {"stage": 1, "overlap_comm": True}})
    )
    assert document["zero_optimization"]["overlap_comm"] is True


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, lowmem's configuration makes it 24"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, lowmem's configuration makes it 3"),
        ({"gradient_clipping": 1.0}, "gradient_clipping is 1.0, lowmem's configuration makes it 0.7"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is true, lowmem's configuration makes it false"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is not lowmem's to pass on; set optim.*"),
        ({"scheduler": {}}, "set optim.schedule"),
        ({"gradient_predivide_factor": 2.0}, "lowmem needs the mean over ranks"),
        ({"curriculum_learning": {}}, "curriculum_learning is not lowmem's to pass on"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, must be 0 | 1 | 2 | 3"),
        ({"zero_optimization": True}, "zero_optimization is true, must be an object"),
        ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow cannot be used"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param.device is nvme; allowed: none, cpu"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, f"allowed: none, cpu; {NVME_REFUSAL}"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs stage 3, found stage 2"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer needs stage 1, 2 or 3, found stage 0"),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads cannot be used"),
        ([], "holds no JSON object"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, document: Any, expected: str) -> None:
    engine = write(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        build(engine)
    assert expected in str(caught.value)
    assert engine["config"] in str(caught.value)


def test_all_problems_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        build(write(tmp_path, {"train_batch_size": 32, "optimizer": {}}))
    assert len(str(caught.value).splitlines()) == 2


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("broken.json", "missing.json"):
        with pytest.raises(ConfigError, match=name):
            build({"config": str(tmp_path / name)})


@pytest.mark.parametrize(("bits", "forced"), [(32, True), (8, False), (4, False)])
def test_offload_insists_on_deepspeeds_optimizers_for_32_bit_states_only(bits: Any, forced: bool) -> None:
    train, optim = TrainConfig(global_batch_size=2, precision="fp32"), OptimConfig(state_bits=bits)
    config = RunConfig(train=train, optim=optim, engine=EngineConfig(name="deepspeed", zero_stage=2, offload="cpu"))
    assert build_deepspeed_config(config, world_size=1, micro_batch_size=2)["zero_force_ds_cpu_optimizer"] is forced


def test_bf16_weights_without_master_copy_need_stage_0() -> None:
    assert build({}, precision="bf16", weight_dtype="bf16")["torch_autocast"] == {"enabled": False}
    with pytest.raises(ConfigError, match="train.weight_dtype is bf16 with ZeRO stage 2"):
        build({"zero_stage": 2}, precision="bf16", weight_dtype="bf16")


def test_the_known_keys_are_those_of_the_installed_deepspeed() -> None:
    """A key that DeepSpeed drops or adds is noticed here."""
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    def keys(cls: Any) -> set[str]:
        return {item.alias or name for name, item in cls.model_fields.items()}

    zero = ds_config._KNOWN["zero_optimization"]
    assert set(zero) == keys(DeepSpeedZeroConfig) - set(ds_config._REFUSED_ZERO) - {"cpu_offload_param"}
    assert set(zero["offload_param"]) == keys(DeepSpeedZeroOffloadParamConfig)
    assert set(zero["offload_optimizer"]) == keys(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(ds_config._KNOWN["bf16"]) == keys(DeepSpeedBF16Config)
    assert set(ds_config._KNOWN["fp16"]) == keys(DeepSpeedFP16Config)
    assert set(ds_config._KNOWN) == ds_config._PASSED_ON
