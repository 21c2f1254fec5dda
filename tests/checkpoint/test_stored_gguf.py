"""A GGUF file that is read in parts gives the very values of transformers, which loads it whole."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
import transformers
from served_models import decoder, quantized, write_template

from qcompile.checkpoint import stored_gguf as module
from qcompile.checkpoint.atomic_folder import CheckpointError
from qcompile.checkpoint.stored_gguf import reads_in_parts, stored_gguf
from qcompile.checkpoint.writers.gguf_file import write_gguf
from qcompile.checkpoint.writers.gguf_template import GgufTemplate
from qcompile.memory.stored_tensor import StoredTensor

WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_template(decoder(), tmp_path_factory.mktemp("gguf") / "float.gguf")


def whole(file):
    return transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")


def stored(file, model=None, small=0):
    return stored_gguf(file, decoder() if model is None else model, small)


def test_floats_are_those_that_transformers_loads(file):
    want, found = decoder().state_dict(), stored(file)
    assert found.keys() == want.keys() and all(isinstance(tensor, StoredTensor) for tensor in found.values())
    for name, tensor in found.items():  # queries and keys are permuted in the file
        values = tensor.read()
        assert values.dtype == torch.float32 and values.is_contiguous() and torch.equal(values, want[name]), name


def test_blocks_are_dequantized_to_what_transformers_makes_of_them(file, tmp_path):
    write_gguf(quantized("int4/group32/f16"), GgufTemplate(file), tmp_path / "q4.gguf")
    want, found = whole(tmp_path / "q4.gguf").state_dict(), stored(tmp_path / "q4.gguf")
    assert found.keys() == want.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor.read(), want[name])] == []
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(str(tmp_path / "q4.gguf")).tensors}
    assert "Q4_0" in kinds


def test_large_tensors_are_read_when_they_are_needed(file, monkeypatch):
    reads, real = [], np.fromfile
    monkeypatch.setattr(module.np, "fromfile", lambda *a, **k: reads.append(a[2]) or real(*a, **k))
    found = stored(file, small=1024)
    assert set(reads) == {128}, "norms"
    reads.clear()
    assert found[WEIGHT].t().bfloat16().shape == (128, 256) and not reads
    assert found[WEIGHT].abs().shape == (256, 128) and reads == [256 * 128]


def test_stacks_of_experts_are_made_of_two_tensors(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, decoder_sparse_step=1,
    )  # fmt: skip
    model = transformers.Qwen2MoeForCausalLM(config)
    path = tmp_path / "experts.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen2moe")
    for add, value in ((writer.add_block_count, 1), (writer.add_context_length, 64), (writer.add_embedding_length, 32),
                       (writer.add_feed_forward_length, 64), (writer.add_head_count, 2), (writer.add_vocab_size, 64),
                       (writer.add_head_count_kv, 2), (writer.add_expert_count, 4), (writer.add_expert_used_count, 2),
                       (writer.add_layer_norm_rms_eps, 1e-6)):  # fmt: skip
        add(value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2MOE, 1)
    tensors = {}
    for name, parameter in model.named_parameters():
        if name.endswith("gate_up_proj"):
            tensors |= dict(zip(("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"), parameter.chunk(2, 1),
                                strict=True))  # fmt: skip
        elif name.endswith("down_proj") and parameter.ndim == 3:
            tensors["blk.0.ffn_down_exps.weight"] = parameter
        else:
            tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = parameter
    for name, tensor in tensors.items():
        flat = tensor[0] if "gate_inp_shexp" in name else tensor
        writer.add_tensor(name, flat.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = stored(path, model)
    want = model.state_dict()
    assert found.keys() == want.keys() and found["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 64, 32)
    assert [name for name, tensor in found.items() if not torch.equal(tensor.read(), want[name])] == []


def test_a_tensor_of_another_size_shows_the_shape_in_the_file(file):
    config = decoder().config
    config.intermediate_size = 512
    found = stored(file, transformers.LlamaForCausalLM(config))
    assert found[WEIGHT].shape == (256, 128)


def test_a_tensor_of_another_form_is_named_when_it_is_read(file):
    model = decoder()
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(256, 128, bias=False)
    with pytest.raises(
        CheckpointError, match=r"float.gguf holds \[256, 128\] as .*up_proj.weight, the model \[128, 256"
    ):
        stored(file, model)[WEIGHT].read()


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_file_that_changes_is_named(file, tmp_path, harm):
    path = tmp_path / "x.gguf"
    path.write_bytes(file.read_bytes())
    found = stored(path)
    if harm == "gone":
        path.unlink()
    else:
        moved = tmp_path / "short"
        moved.write_bytes(file.read_bytes()[:20000])
        moved.replace(path)
    with pytest.raises(CheckpointError, match="x.gguf cannot be read any more .*Fix: restore it, and run again"):
        found[WEIGHT].read()


def test_types_that_nobody_dequantizes_are_refused_before_work(tmp_path):
    path = write_template(decoder(), tmp_path / "x.gguf", [("odd", torch.zeros(4, 4, dtype=torch.int32))])
    with pytest.raises(NotImplementedError):
        stored(path)


def test_architectures_that_are_read_whole_are_refused(file, tmp_path):
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(str(path), "lfm2")
    writer.add_tensor("t", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert reads_in_parts(file)
    if not reads_in_parts(path):  # it depends on the version of transformers
        with pytest.raises(CheckpointError, match="of an architecture that transformers reads whole. Fix: "):
            stored(path)
